"""What configurations print, and which modules keep the protocols of a layer."""

import dataclasses

import pytest

from effjax import data
from effjax.attention import Attention, BigBird, Linformer, Longformer
from effjax.attention.linear import LinearAttention
from effjax.attention.longlora import ShiftedSparseAttention
from effjax.attention.lsra import LSRA
from effjax.layers import MLP, FeedForward, LayerSpec, Mixer, TransformerConfig
from effjax.models import Transformer, presets
from effjax.moe import MoE, TopK

FORGETFUL = (Attention, BigBird, Longformer, ShiftedSparseAttention, Linformer, LSRA)


@pytest.mark.parametrize("kind", [*FORGETFUL, LinearAttention])
def test_mixers_say_whether_they_rewind(kind):
  sizes = {"length": 8, "rank": 2} if kind is Linformer else {}
  assert isinstance(kind(2, **sizes), Mixer)
  assert kind.rewinds is (kind in FORGETFUL)
  assert "rewinds" not in {field.name for field in dataclasses.fields(kind)}


def test_feed_forward_layers():
  assert isinstance(MLP(4), FeedForward)
  assert isinstance(MoE(TopK(2, 1), MLP(4)), FeedForward)


@pytest.mark.parametrize("preset", [presets.SMOLLM2_135M, presets.GEMMA3_270M, presets.BERT_BASE])
def test_a_configuration_prints_in_a_line(preset):
  assert "\n" not in repr(preset) and len(repr(preset)) < 120
  assert repr(preset) in repr(Transformer(preset)) and len(repr(Transformer(preset))) < 250


def test_a_pattern_is_seen_in_it():
  near, far = LayerSpec(Attention(2), MLP(8)), LayerSpec(None, MLP(8), tag="far")
  shown = repr(TransformerConfig(16, 4, (near, near, far) * 3))
  layers = "2 × LayerSpec(Attention + MLP), 1 × LayerSpec(MLP, tag='far'), 2 × LayerSpec("
  assert layers in shown and shown.endswith("… (9 in all))")


def test_a_corpus_prints_in_a_line():
  shown = repr(data.text("pydoc", limit_bytes=20_000))
  assert "\n" not in shown and len(shown) < 100
