"""The protocols of a layer's modules, and which modules keep them."""

import dataclasses

import pytest

from effjax.attention import Attention, BigBird, Linformer, Longformer
from effjax.attention.linear import LinearAttention
from effjax.attention.longlora import ShiftedSparseAttention
from effjax.attention.lsra import LSRA
from effjax.layers import MLP, FeedForward, LayerSpec, Mixer, TransformerConfig
from effjax.layers.spec import require
from effjax.moe import MoE

FORGETFUL = (Attention, BigBird, Longformer, ShiftedSparseAttention, Linformer, LSRA)


@pytest.mark.parametrize("kind", [*FORGETFUL, LinearAttention])
def test_mixers_say_whether_they_rewind(kind):
  sizes = {"length": 8, "rank": 2} if kind is Linformer else {}
  assert isinstance(kind(2, **sizes), Mixer)
  assert kind.rewinds is (kind in FORGETFUL)
  assert "rewinds" not in {field.name for field in dataclasses.fields(kind)}


def test_feed_forward_layers():
  assert isinstance(MLP(4), FeedForward)
  assert isinstance(MoE(2, 1, 4), FeedForward)


def test_what_lacks_a_part_is_named():
  config = TransformerConfig(8, 4, (LayerSpec(None, MLP(4)), LayerSpec(MLP(4), None)))
  require(config, "ffn", "flops")
  with pytest.raises(
    ValueError, match="layer 1: mixer MLP has no init_cache and no rewinds; allow"
  ):
    require(config, "mixer", "init_cache", "flops", "rewinds")
