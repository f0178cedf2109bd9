"""Calibrated quantisation against float64: sequential optimal brain surgeon, searches, formulas."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import quant
from effjax.quant import awq, gptq, smoothquant
from effjax.quant.model import representation

D, F, GROUP = 160, 6, 32  # more inputs than one block of GPTQ, which they do not divide
METHODS = {
  "int4": {"group": GROUP},
  "int4affine": {"group": GROUP},
  "nf4": {"block": GROUP, "double": True},
  "fp4": {"block": GROUP},
}


def problem(*batch, seed=0):
  """Weights, and inputs that differ in size and go together."""
  rng = np.random.default_rng(seed)
  mixed = rng.normal(size=(*batch, D, D)) * np.exp(rng.normal(size=D))
  x = rng.normal(size=(*batch, 300, D)) @ mixed / 12
  return rng.normal(size=(*batch, D, F)).astype(np.float32), x


def gram(x):
  return np.swapaxes(x, -1, -2) @ x


def error(x, w, quantised):
  return ((x @ (w - np.asarray(quantised, np.float64))) ** 2).sum()


def surgeon(w, h, values):
  """Rounds one input after another to the nearest of its values [D, F, 16], and lets all that are
  left make up for it as well as they can."""
  w, inverse, rounded = w.astype(np.float64), np.linalg.inv(h), np.zeros(w.shape)
  for i in np.argsort(-np.diag(h), kind="stable"):
    nearest = np.abs(values[i] - w[i][:, None]).argmin(1)
    rounded[i] = values[i][np.arange(F), nearest]
    w = w - np.outer(inverse[:, i], (w[i] - rounded[i]) / inverse[i, i])
    inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    inverse[i, i] = 1
  return rounded


@pytest.mark.parametrize("method", METHODS)
def test_gptq_is_the_optimal_surgeon(method):
  (w, x), options = problem(), METHODS[method]
  h = gram(x)
  made = representation(method).quantize(w, **options)
  spread = lambda c: np.repeat(np.asarray(c, np.float64).T, GROUP, 0)
  scale, *zero = map(spread, made.constants)
  table = np.asarray(made.format.table)
  values = (table - (zero[0] if zero else np.zeros_like(scale))[..., None]) * scale[..., None]
  want = surgeon(w, h + 0.01 * np.diag(h).mean() * np.eye(D), values)
  got = gptq({"up": {"kernel": w}}, {"up": jnp.asarray(h, jnp.float32)}, method, **options)
  got = np.asarray(got["up"]["kernel"].materialize())
  assert np.mean(np.abs(got - want) > 1e-4) < 0.01  # ties, and sums rounded otherwise
  assert error(x, w, got) == pytest.approx(error(x, w, want), rel=0.01)
  assert error(x, w, got) < 0.5 * error(x, w, made.materialize())


def test_each_layer_has_its_own_statistic():
  w, x = problem(2)
  h = jnp.asarray(gram(x), jnp.float32)
  mean = jnp.asarray(np.abs(x).mean(1), jnp.float32)
  for change in (
    lambda w, h, mean: gptq({"up": {"kernel": w}}, {"up": h}, group=GROUP),
    lambda w, h, mean: awq({"up": {"kernel": w}}, {"up": h}, {"up": mean}, group=GROUP),
    lambda w, h, mean: smoothquant({"up": {"kernel": w}}, {"up": mean}),
  ):
    both = change(w, h, mean)["up"]["kernel"].materialize()
    for i in range(2):
      alone = change(w[i], h[i], mean[i])["up"]["kernel"].materialize()
      chex.assert_trees_all_close(both[i], alone, rtol=1e-5)


def test_inputs_that_never_are_anything_are_rounded_to_the_nearest():
  w, _ = problem()
  nothing = gptq({"up": {"kernel": w}}, {"up": jnp.zeros((D, D))}, group=GROUP)["up"]["kernel"]
  chex.assert_trees_all_equal(nothing.codes, quant.Int4.quantize(w, group=GROUP).codes)
  still = {"up": jnp.zeros(D)}
  for changed in (
    awq({"up": {"kernel": w}}, {"up": jnp.zeros((D, D))}, still, group=GROUP),
    awq(
      {"up": {"kernel": w}}, {"up": jnp.zeros((D, D))}, {"up": jnp.full(D, jnp.nan)}, group=GROUP
    ),
    smoothquant({"up": {"kernel": w}}, still, "int4", group=GROUP),
  ):
    off = np.abs(np.asarray(changed["up"]["kernel"].materialize()) - w)
    assert off.max() < 0.5 * np.abs(w).max() / 7 * 1.5


def test_awq_finds_the_least_error_of_all_exponents():
  w, x = problem()
  h, mean = gram(x), np.abs(x).mean(0)

  def rounded(m):
    scale = np.repeat(np.abs(m).reshape(-1, GROUP, F).max(1), GROUP, 0) / 7
    return np.round(m / scale) * scale

  def of(ratio):
    s = np.maximum(mean, 1e-4) ** ratio
    s = (s / np.sqrt(s.max() * s.min()))[:, None]
    return rounded(w * s) / s

  want = min((of(i / 20) for i in range(20)), key=lambda m: error(x, w, m))
  statistics = ({"up": jnp.asarray(each, jnp.float32)} for each in (h, mean))
  got = awq({"up": {"kernel": w}}, *statistics, group=GROUP)["up"]["kernel"].materialize()
  assert error(x, w, got) == pytest.approx(error(x, w, want), rel=1e-3)
  assert error(x, w, got) < 0.9 * error(x, w, rounded(w))


def test_smoothquant_is_the_formula():
  w, x = problem()
  peak = np.abs(x).max(0)
  kernel = smoothquant({"up": {"kernel": w}}, {"up": jnp.asarray(peak, jnp.float32)})["up"][
    "kernel"
  ]
  s = peak**0.5 / np.abs(w).max(1) ** 0.5
  smooth, moved = x / s, w * s[:, None]
  row, channel = np.abs(smooth).max(1, keepdims=True) / 127, np.abs(moved).max(0) / 127
  want = (np.round(smooth / row) @ np.round(moved / channel)) * row * channel
  got = np.asarray(kernel.matmul(jnp.asarray(x, jnp.float32)))
  assert np.abs(got - want).max() < 0.01 * np.abs(want).max()
  plain = quant.Int8Dynamic.quantize(w).matmul(jnp.asarray(x, jnp.float32))
  assert ((got - x @ w) ** 2).sum() < ((np.asarray(plain) - x @ w) ** 2).sum()


def test_bad_input_is_named():
  w, x = problem()
  params, h = {"up": {"kernel": w}}, jnp.asarray(gram(x), jnp.float32)
  peak = jnp.ones(D)
  for message, change in {
    "damping=-1": lambda: gptq(params, {"up": h}, damping=-1),
    "allowed: int4, int4affine, nf4, fp4": lambda: gptq(params, {"up": h}, "int8"),
    "'int3' is unknown": lambda: awq(params, {"up": h}, {"up": peak}, "int3"),
    "'int4' has no option 'bits'; allowed: group": lambda: gptq(params, {"up": h}, bits=3),
    "'nf4' has no option 'group'": lambda: awq(params, {"up": h}, {"up": peak}, "nf4", group=8),
    "'int8dynamic' has no option 'beta'; allowed: granularity": (
      lambda: smoothquant(params, {"up": peak}, beta=0.5)
    ),
    "alpha=2": lambda: smoothquant(params, {"up": peak}, alpha=2),
    "of none": lambda: gptq(params, {}),
    "of the same layers": lambda: awq(params, {"up": h}, {"down": peak}),
    "statistics of down have no kernel; allowed: up": lambda: gptq(params, {"down": h}),
    "up/kernel: a statistic has shape": lambda: smoothquant(params, {"up": h}),
    "up/kernel: group 7": lambda: gptq(params, {"up": h}, group=7),
    "up/kernel: H is not positive": lambda: gptq(
      params, {"up": jnp.ones((D, D))}, damping=0, group=GROUP
    ),
    "up/kernel is Int8 already": lambda: gptq(quant.quantize(params), {"up": h}),
  }.items():
    with pytest.raises(ValueError, match=message):
      change()
