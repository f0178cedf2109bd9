"""Upcycling keeps the function of the whole model, whichever layers it changes."""

import dataclasses

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
from effjax.moe import MoE, TopK, merge_experts, upcycle, upcycle_ffn
from effjax.quant.int8 import Int8
from tests.modules import apply, normal, random_params

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


def test_narrow_experts_are_slices_of_shuffled_copies(key, params):
  ffn = split(CONFIG, params)[0][0]["ffn"]
  made = jax.tree.map(np.asarray, upcycle_ffn(ffn, key, experts=5, width=7)["experts"])
  columns = np.asarray(ffn["up"]["bias"]).tolist()
  units = np.array([[columns.index(b) for b in bias] for bias in made["up"]["bias"].tolist()])
  counts = np.bincount(units.reshape(-1), minlength=12)  # of three copies the last is cut
  assert set(counts) == {2, 3} and counts.sum() == 35
  assert sorted(units.reshape(-1)[:12]) == sorted(units.reshape(-1)[12:24]) == list(range(12))
  assert units.reshape(-1)[:12].tolist() not in (list(range(12)), units.reshape(-1)[12:24].tolist())
  for e, own in enumerate(units):
    np.testing.assert_array_equal(made["up"]["kernel"][e], ffn["up"]["kernel"][:, own])
    np.testing.assert_array_equal(made["down"]["kernel"][e], ffn["down"]["kernel"][own])
    np.testing.assert_array_equal(made["down"]["bias"][e], ffn["down"]["bias"])


def test_a_share_of_each_expert_is_drawn_anew(key, params):
  ffn = split(CONFIG, params)[0][0]["ffn"]
  options = {"experts": 40, "width": 7}
  kept = jax.tree.map(np.asarray, upcycle_ffn(ffn, key, **options)["experts"])
  made = jax.tree.map(np.asarray, upcycle_ffn(ffn, key, redrawn=0.5, **options)["experts"])
  new = made["up"]["bias"] == 0
  assert (new.sum(axis=1) == 4).all() and len({tuple(row) for row in new}) > 10
  for name, axis in (("up", 1), ("down", 2)):
    same = (made[name]["kernel"] == kept[name]["kernel"]).all(axis)
    np.testing.assert_array_equal(same, ~new)
  drawn = np.moveaxis(made["up"]["kernel"], 1, 2)[new]
  assert abs(drawn.std() / 0.02 - 1) < 0.1 and abs(drawn.mean()) < 0.002
  np.testing.assert_array_equal(made["down"]["bias"], kept["down"]["bias"])


def test_qwens_recipe_gives_a_model_of_its_configuration(key, params, tokens):
  config, upcycled = upcycle(CONFIG, params, key, experts=4, width=6, redrawn=0.5, layers=[0, 2])
  assert config.layers[0].ffn.expert == CONFIG.layers[0].ffn.clone(width=6)
  shapes = jax.eval_shape(Transformer(config).init, key, tokens)["params"]
  chex.assert_trees_all_equal_shapes_and_dtypes(upcycled, shapes)


@pytest.mark.parametrize("by", ["mean", 2])
def test_equal_experts_become_the_mlp_again(key, params, by):
  config, upcycled = upcycle(CONFIG, params, key, experts=3, layers=[1, 3])
  dense, back = merge_experts(config, upcycled, by=by)
  assert dense == CONFIG
  chex.assert_trees_all_close(back, params, rtol=1e-6)


def test_what_is_shared_is_put_beside_the_mean(key):
  of = lambda width: MLP(width, "gelu", use_bias=True)
  layer = MoE(TopK(2, 1), of(3), shared=of(5))
  config = TransformerConfig(11, 8, (LayerSpec(None, layer),), scan=False)
  x = normal(2, 4, 8)
  ffn = random_params(layer, x)
  dense, back = merge_experts(config, {"segments_0": {"layers_0": {"ffn": ffn}}}, by="mean")
  mean = jax.tree.map(lambda w: w.mean(0), ffn["experts"])
  expected = apply(of(3), mean, x) + apply(of(5), ffn["shared"], x)
  found = apply(dense.layers[0].ffn, back["segments_0"]["layers_0"]["ffn"], x)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  other = dataclasses.replace(config, layers=(LayerSpec(None, layer.clone(shared=MLP(5))),))
  with pytest.raises(ValueError, match="layer 0: shared is another MLP"):
    merge_experts(other, {"segments_0": {"layers_0": {"ffn": ffn}}})


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
  with pytest.raises(ValueError, match="top_k=4; allowed: 1 … 3"):
    upcycle(CONFIG, params, key, experts=3, top_k=4)
  with pytest.raises(ValueError, match=r"width=0; allowed: from 1"):
    upcycle(CONFIG, params, key, width=0)
  with pytest.raises(ValueError, match=r"redrawn=1\.5; allowed: 0 … 1"):
    upcycle(CONFIG, params, key, redrawn=1.5)
  w = Int8.quantize(jnp.ones((4, 6)))
  with pytest.raises(ValueError, match=r"redrawn=0\.5 and up/kernel is Int8"):
    ffn = {"up": {"kernel": w}, "down": {"kernel": jnp.ones((6, 4))}}
    upcycle_ffn(ffn, key, experts=2, redrawn=0.5)
