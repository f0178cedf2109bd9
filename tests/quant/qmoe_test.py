"""Ternary calibration against the optimal surgeon in float64, and rounding to the nearest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.quant import Ternary, qmoe
from effjax.quant.calibrated import each_matrix
from tests.quant.calibrated_test import D, error, gram, problem, surgeon


def values(w):
  return np.stack([np.minimum(w.min(0), 0), np.zeros(w.shape[1]), np.maximum(w.max(0), 0)], -1)


def test_it_is_the_optimal_surgeon_of_three_numbers():
  w, x = problem()
  h = gram(x)
  damped = h + 0.1 * np.diag(h).mean() * np.eye(D)
  want = surgeon(w, damped, np.broadcast_to(values(w), (D, *values(w).shape)))
  got = qmoe({"up": {"kernel": w}}, {"up": jnp.asarray(h, jnp.float32)})["up"]["kernel"]
  got, nearest = np.asarray(got), np.asarray(Ternary.quantize(w))
  assert np.mean(np.abs(got - want) > 1e-4) < 0.01  # ties, and sums rounded otherwise
  assert error(x, w, got) == pytest.approx(error(x, w, want), rel=0.01)
  assert error(x, w, got) < 0.5 * error(x, w, nearest)


def test_experts_have_their_own_and_one_without_rows_is_rounded_to_the_nearest():
  w, x = problem(2)
  grams = jnp.asarray(gram(x), jnp.float32).at[1].set(0)
  both = qmoe({"up": {"kernel": w}}, {"up": grams})["up"]["kernel"].materialize()
  alone = qmoe({"up": {"kernel": w[0]}}, {"up": grams[0]})["up"]["kernel"].materialize()
  assert np.mean(np.abs(both[0] - alone) > 1e-4) < 0.01
  np.testing.assert_allclose(both[1], Ternary.quantize(w[1]).materialize(), rtol=1e-6)


def test_some_matrices_go_together_and_the_rest_after_them():
  x = jnp.arange(14.0).reshape(2, 7)
  found = each_matrix(lambda a, b: (a + b, a * b), 2, x, x, at_once=3)
  np.testing.assert_array_equal(found, (2 * x, x * x))


def test_bad_input_is_named():
  w, x = problem()
  params, h = {"up": {"kernel": w}}, jnp.asarray(gram(x), jnp.float32)
  for message, change in {
    "qmoe: damping=-1": lambda: qmoe(params, {"up": h}, damping=-1),
    "up/kernel: scale_dtype float16": lambda: qmoe(params, {"up": h}, scale_dtype=jnp.float16),
    "of none": lambda: qmoe(params, {}),
    "up/kernel: w has NaN": lambda: qmoe({"up": {"kernel": w * np.nan}}, {"up": h}),
    "up/kernel: H is not positive": lambda: qmoe(params, {"up": jnp.ones((D, D))}, damping=0),
    "up/kernel is Ternary already": lambda: qmoe(qmoe(params, {"up": h}), {"up": h}),
    "up/kernel: w is a traced": lambda: jax.jit(qmoe)(params, {"up": h}),
  }.items():
    with pytest.raises(ValueError, match=message):
      change()
