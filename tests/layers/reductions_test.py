"""Reductions against numpy on the tokens that are there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.layers import reductions

EDGES = (0.5, 1.0, 2.0)
EXPECTED = {
  "sum_of_squares": lambda rows: (rows**2).sum(0),
  "gram": lambda rows: rows.T @ rows,
  "absmax": lambda rows: np.abs(rows).max(0),
  "total": lambda rows: rows.sum(0),
  "count": lambda rows: len(rows),
  "mean": lambda rows: rows.mean(0),
  "mean_magnitude": lambda rows: np.abs(rows).mean(0),
  "histogram": lambda rows: np.histogram(np.abs(rows), (0, *EDGES, np.inf))[0],
}


def reduction(name):
  return reductions.histogram(EDGES) if name == "histogram" else getattr(reductions, name)


def values(shape, dtype=jnp.float32):
  """Values, NaN and inf at padding; a mask of their leading axes; the rows that are there."""
  random = np.random.default_rng(0)
  x = np.array(jnp.asarray(random.normal(size=shape), dtype), np.float32)
  mask = random.random(shape[: min(2, len(shape) - 1)]) < 0.7
  kept = x[mask].reshape(-1, shape[-1])
  x[~mask] = np.where(random.random(x[~mask].shape) < 0.5, np.nan, -np.inf)
  return jnp.asarray(x, dtype), jnp.asarray(mask), kept


@functools.partial(jax.jit, static_argnames="parts")
def reduced(x, mask, parts=1):
  """Every reduction of x, cut into `parts` along the batch."""
  cut = lambda x: [None] * parts if x is None else jnp.split(x, parts)
  found = {}
  for name in (*EXPECTED, "keep"):
    reduce = reduction(name)
    measured = map(reduce.measure, cut(x), cut(mask))
    found[name] = reduce.finish(functools.reduce(reduce.combine, measured))
  return found


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("shape", [(3, 7, 4), (9, 4), (2, 5, 3, 4)])
def test_only_tokens_that_are_there_count(name, shape):
  x, mask, rows = values(shape)
  found = reduced(x, mask)[name]
  np.testing.assert_allclose(found, EXPECTED[name](rows), rtol=1e-5, atol=1e-5)
  everything = np.nan_to_num(np.asarray(x), posinf=1.0, neginf=-1.0)
  found = reduced(everything, None)[name]
  np.testing.assert_allclose(found, EXPECTED[name](everything.reshape(-1, 4)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EXPECTED)
def test_parts_combine_to_the_whole(name):
  x, mask, rows = values((6, 7, 4))
  found = reduced(x, mask, parts=3)[name]
  np.testing.assert_allclose(found, EXPECTED[name](rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EXPECTED)
def test_statistics_are_float32(name):
  x, mask, rows = values((6, 7, 4), jnp.bfloat16)
  found = reduced(x, mask, parts=3)[name]
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, EXPECTED[name](rows), rtol=1e-5, atol=1e-5)


def test_kept_values_join_on_the_batch_axis_and_padding_is_zero():
  x, mask, _ = values((6, 7, 4), jnp.bfloat16)
  kept = reduced(x, mask, parts=3)["keep"]
  assert kept.dtype == jnp.bfloat16
  kept, x, mask = map(np.asarray, (kept, x, mask))
  np.testing.assert_array_equal(kept[mask], x[mask])
  assert not kept[~mask].any()


def test_histogram_counts_every_number_once():
  x = jnp.array([[jnp.nan, jnp.inf, -jnp.inf, 0.0, 1.0, -1.0, 0.999, 3.0]])
  assert reductions.histogram([1.0, 3.0]).measure(x, None).tolist() == [2, 2, 4]


@pytest.mark.parametrize("edges", [(), (0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (float("nan"),)])
def test_histogram_refuses_edges_that_do_not_increase(edges):
  with pytest.raises(ValueError, match="allowed: positive numbers that increase"):
    reductions.histogram(edges)
