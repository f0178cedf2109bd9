import pytest

from effjax import data
from effjax.attention import Attention
from effjax.layers import MLP, LayerSpec, TransformerConfig
from effjax.models import Transformer, presets


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
