import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import linear, trees
from effjax.peft import DoRA, lora
from effjax.quant import Int8
from tests.modules import normal

KEY = jax.random.key(0)


def trained(base, dropout=0.0, seed=3):
  """A `DoRA` of which nothing is as at the start."""
  w = dataclasses.replace(lora.init(base, KEY, rank=2, scale=0.5), dropout=dropout)
  w = DoRA.over(dataclasses.replace(w, b=normal(*w.b.shape, seed=seed)))
  moved = jnp.asarray(np.random.default_rng(seed).uniform(0.5, 2, w.magnitude.shape), jnp.float32)
  return dataclasses.replace(w, magnitude=w.magnitude * moved)


def wide(x):
  return np.asarray(x, np.float64)


def parts(w):
  """W0 + s·A B and m/n in float64."""
  matrix = wide(w.base) + wide(w.scale) * (wide(w.a) @ wide(w.b))
  return matrix, wide(w.magnitude) / np.sqrt((matrix**2).sum(-2, keepdims=True))


@jax.jit
def views(w, x, bias, ids):
  return w.materialize(), linear(x, w, bias), linear(x[..., : w.shape[1]], w.T), w.take(ids)


def test_it_starts_as_what_it_stands_over():
  base, x = normal(8, 6), normal(3, 8, seed=1)
  w = DoRA.over(lora.init(base, KEY, rank=2, scale=1.0))
  np.testing.assert_allclose(w.magnitude, np.linalg.norm(base, axis=0)[None], rtol=1e-6)
  np.testing.assert_allclose(linear(x, w), x @ base, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [jnp.asarray, Int8.quantize], ids=["array", "int8"])
def test_columns_have_the_lengths_of_the_magnitudes(make):
  w, x, bias, ids = trained(make(normal(8, 6))), normal(2, 3, 8), normal(6), np.array([[7, 0]])
  matrix, ratio = parts(w)
  expected = matrix * ratio
  whole, product, transposed, rows = views(w, x, bias, ids)
  np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(whole, axis=0), abs(w.magnitude)[0], rtol=1e-5)
  np.testing.assert_allclose(
    product, wide(x) @ expected + wide(bias)[None, None], rtol=1e-5, atol=1e-5
  )
  np.testing.assert_allclose(transposed, wide(x)[..., :6] @ expected.T, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(rows, expected[ids], rtol=1e-5, atol=1e-5)


def test_the_norm_is_constant_to_derivatives():
  w, x, dy = trained(normal(8, 6)), normal(3, 8, seed=1), normal(3, 6, seed=2)
  grads = jax.jit(jax.grad(lambda w: (linear(x, w) * dy).sum()))(w)
  matrix, ratio = parts(w)
  norm, y = wide(w.magnitude) / ratio, wide(x) @ matrix
  scaled = wide(w.scale) * wide(dy) * ratio
  np.testing.assert_allclose(
    grads.magnitude, (wide(dy) * y).sum(0, keepdims=True) / norm, rtol=1e-5
  )
  np.testing.assert_allclose(grads.b, (wide(x) @ wide(w.a)).T @ scaled, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(grads.a, wide(x).T @ scaled @ wide(w.b).T, rtol=1e-4, atol=1e-5)


def test_what_is_dropped_is_dropped_where_the_columns_are_scaled_too():
  w, x = trained(normal(8, 6), dropout=0.5), normal(3, 8, seed=1)
  drawn = w.drawn(KEY)
  matrix, ratio = parts(w)
  seen = wide(drawn.dropped(x))
  expected = wide(x) @ wide(w.base) + seen @ (ratio * matrix - wide(w.base))
  np.testing.assert_allclose(linear(x, drawn), expected, rtol=1e-5, atol=1e-5)
  stacked = trained(normal(1, 8, 6), dropout=0.5).drawn(KEY)
  one = jax.tree.map(lambda leaf: leaf[0], stacked)
  product = stacked.product(x, lambda x, w: jnp.matmul(x, w[0]))
  np.testing.assert_allclose(product, linear(x, one), rtol=1e-5, atol=1e-5)


def test_a_column_of_zeros_stays_and_can_learn():
  base = normal(8, 6).at[:, 2].set(0)
  w = DoRA.over(lora.init(base, KEY, rank=2, scale=1.0))
  y, grads = jax.value_and_grad(lambda w: linear(normal(3, 8), w).sum())(w)
  chex.assert_tree_all_finite((y, grads, w.materialize(), w.beneath(w.materialize())))
  assert np.asarray(grads.b)[:, 2].any()


def test_stacks_are_many_matrices_and_half_precision_follows():
  w = trained(normal(2, 3, 8, 6))
  whole = np.asarray(w.materialize())
  one = jax.tree.map(lambda leaf: leaf[1, 2], w)
  np.testing.assert_allclose(whole[1, 2], one.materialize(), rtol=1e-6, atol=1e-6)
  x = normal(3, 8)
  half = linear(x.astype(jnp.bfloat16), one)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(jnp.float32), linear(x, one), rtol=0.05, atol=0.2)


def test_add_trains_magnitudes_too_and_merge_takes_them_in():
  params = {"query": {"kernel": normal(2, 8, 6)}, "embed": {"embedding": normal(9, 6, seed=1)}}
  adapted = lora.add(params, KEY, rank=2, targets="kernel|embedding", dora=True)
  assert trees.trained(adapted) >= {"query/kernel/magnitude", "embed/embedding/magnitude"}
  extra = 2 * (2 * (8 + 6) + 6) + 2 * (9 + 6) + 6
  assert trees.count(adapted) == trees.count(params) + extra
  adapted["query"]["kernel"] = trained(params["query"]["kernel"])
  merged = lora.merge(adapted)
  chex.assert_trees_all_close(merged["embed"], params["embed"], rtol=1e-6)
  chex.assert_trees_all_equal(lora.unmerge(merged, adapted), adapted)
  changed = jax.tree.map(lambda x: x * 1.0001, merged)
  back = lora.unmerge(changed, adapted)["query"]["kernel"]
  np.testing.assert_allclose(back.base, params["query"]["kernel"], atol=2e-3)
  with pytest.raises(ValueError, match=r"query/kernel has a DoRA already"):
    lora.add(adapted, KEY, rank=2, targets="kernel")
  with pytest.raises(ValueError, match=r"DoRA: magnitude has shape \(1, 5\); allowed: \(1, 6\)"):
    dataclasses.replace(trained(normal(8, 6)), magnitude=jnp.ones((1, 5)))
