"""Upcycling keeps the function of the whole model, whichever layers it changes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import masks
from effjax.attention.multi_head import Attention
from effjax.layers import MLP, LayerSpec, TransformerConfig
from effjax.layers.stack import split
from effjax.models.transformer import Transformer
from effjax.moe import MoE, upcycle, upcycle_ffn
from effjax.quant.int8 import Int8
from tests.modules import apply, random_params

MIXER = Attention(heads=2, mask=masks.Causal())
CONFIG = TransformerConfig(
  vocab_size=11,
  width=8,
  layers=(LayerSpec(mixer=MIXER, ffn=MLP(12, "gelu", use_bias=True)),) * 4,
  context=16,
)


@pytest.fixture
def tokens():
  return np.random.default_rng(0).integers(0, 11, (2, 7))


@pytest.fixture
def params(tokens):
  return random_params(Transformer(CONFIG), tokens)


@pytest.mark.parametrize("layers", [None, [1, 3], [-1]])
def test_the_model_computes_the_same_at_first(key, params, tokens, layers):
  config, upcycled = upcycle(CONFIG, params, key, experts=3, top_k=2, layers=layers)
  chosen = range(4) if layers is None else [index % 4 for index in layers]
  kinds = [isinstance(spec.ffn, MoE) for spec in config.layers]
  assert kinds == [index in chosen for index in range(4)]
  before = apply(Transformer(CONFIG), params, tokens)
  after = apply(Transformer(config), upcycled, tokens)
  chex.assert_trees_all_close(after, before, atol=1e-5)


def test_routers_differ_and_experts_do_not(key, params):
  config, upcycled = upcycle(CONFIG, params, key, experts=3)
  trees = split(config, upcycled)[0]
  routers = [np.asarray(tree["ffn"]["router"]["kernel"]) for tree in trees]
  assert 0.01 < np.std(routers) < 0.03
  assert not np.allclose(routers[0], routers[1])
  up = np.asarray(trees[2]["ffn"]["experts"]["up"]["kernel"])
  chex.assert_trees_all_equal(up[0], up[1], up[2])


def test_quantized_experts(key):
  w = jax.random.normal(key, (4, 6))
  ffn = {"up": {"kernel": Int8.quantize(w)}, "down": {"kernel": w.T}}
  copies = upcycle_ffn(ffn, key, experts=3)["experts"]["up"]["kernel"]
  assert copies.shape == (3, 4, 6)
  chex.assert_trees_all_equal(copies.materialize()[2], ffn["up"]["kernel"].materialize())


def test_bad_arguments(key, params):
  with pytest.raises(ValueError, match="layers has 4; allowed: -4 … 3"):
    upcycle(CONFIG, params, key, layers=[4])
  config, upcycled = upcycle(CONFIG, params, key, experts=2, layers=[0])
  with pytest.raises(ValueError, match="the ffn of layer 0 is MoE; allowed: MLP"):
    upcycle(config, upcycled, key, layers=[0])
  with pytest.raises(ValueError, match="no layer to change"):
    upcycle(CONFIG, params, key, layers=[])
  with pytest.raises(ValueError, match="experts=0; allowed: from 1"):
    upcycle(CONFIG, params, key, experts=0)
  with pytest.raises(ValueError, match="allowed: up, down, perhaps gate"):
    upcycle_ffn({"up": {"kernel": jnp.ones((2, 2))}}, key, experts=2)
