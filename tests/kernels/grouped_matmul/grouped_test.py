"""A weight that is another array for each row."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import core
from effjax.core import weights
from effjax.kernels.grouped_matmul import Grouped

ROWS, GROUP = 7, np.array([0, 0, 2, 2, 2, 3])  # and one row of no group
SIZES = jnp.array([2, 0, 3, 1])
linear = jax.jit(core.linear)


def grouped(*shape, seed=0):
  base = jax.random.normal(jax.random.key(seed), (4, *shape))
  return Grouped(base, SIZES, ROWS), np.asarray(base)[GROUP]


def test_matrices_and_vectors_are_those_of_the_row():
  w, of_row = grouped(3, 5)
  bias, bias_of_row = grouped(5, seed=1)
  x = jax.random.normal(jax.random.key(2), (1, ROWS, 3))
  expected = np.einsum("md,mdf->mf", x[0, :6], of_row)
  chex.assert_trees_all_close(linear(x, w)[0, :6], expected, atol=1e-5)
  chex.assert_trees_all_close(linear(x, w, bias)[0, :6], expected + bias_of_row, atol=1e-5)
  assert not np.asarray(linear(x, w, bias)[0, 6:]).any()
  plain = jnp.arange(5.0)
  chex.assert_trees_all_close(linear(x, w, plain)[0, :6], expected + plain[None], atol=1e-5)
  y = jnp.ones((1, ROWS, 5))
  chex.assert_trees_all_close(weights.along(bias, y)[0, :6], bias_of_row)
  back = np.einsum("mf,mdf->md", y[0, :6], of_row)
  chex.assert_trees_all_close(linear(y, weights.transpose(w))[0, :6], back, atol=1e-5)


def test_rows_of_no_group_reach_no_vector():
  base = grouped(5)[0].base
  y = jax.random.normal(jax.random.key(2), (1, ROWS, 5)).at[:, 6:].set(jnp.nan)
  scaled = lambda base: (weights.along(Grouped(base, SIZES, ROWS), y) * y)[:, :6].sum()
  expected = np.zeros((4, 5))
  np.add.at(expected, GROUP, y[0, :6])
  chex.assert_trees_all_close(jax.jit(jax.grad(scaled))(base), expected, atol=1e-6)


def test_what_it_cannot_do_is_refused():
  with pytest.raises(ValueError, match=r"\(1, 6, 3\) against .*; allowed: 7 rows"):
    linear(jnp.ones((1, 6, 3)), grouped(3, 5)[0])
  with pytest.raises(ValueError, match="another array for each row"):
    weights.materialize(grouped(3, 5)[0])
  with pytest.raises(ValueError, match=r"base has shape \(4, 2, 3, 5\); allowed: .* \[E, D, F\]"):
    grouped(2, 3, 5)
