"""Powers of two above a running maximum, and what changes where a device flushes small ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention.masks import Causal
from effjax.kernels.flash_attention import cases
from effjax.kernels.flash_attention.fused import gpu, steps
from effjax.kernels.flash_attention.fused.sizes import Size, Sizes

# scale, soft cap, and whether something is added: scores in units of log 2, or of their own
UNITS = [(0.125, None, False), (3.0, None, False), (0.125, None, True), (0.5, 20.0, False)]


def powers_and_log2(scale, softcap, extra):
  log2 = steps.unit(scale, softcap, extra) * np.log2(np.e)
  return steps.Powers.of(scale, softcap, extra, steps.power), log2


@pytest.mark.parametrize("unit", UNITS)
def test_powers_are_those_of_float64(unit):
  powers, log2 = powers_and_log2(*unit)
  scores = np.random.default_rng(0).normal(size=(4, 60), scale=4 / log2).astype(np.float32)
  wide, most = scores.astype(np.float64), scores.max(-1, keepdims=True)
  got = powers(jnp.asarray(scores), jnp.asarray(most) * powers.inner)
  np.testing.assert_allclose(got, 2 ** ((wide - most) * log2), rtol=2e-6)
  assert (np.asarray(got).max(-1) == 1).all()


@pytest.mark.parametrize("unit", UNITS[:3])
def test_scores_at_the_end_of_the_range_do_not_overflow(unit):
  powers, _ = powers_and_log2(*unit)
  end = np.finfo(np.float32).max
  scores = jnp.array([[end, end, -end, -jnp.inf], [-end, -end, -jnp.inf, -jnp.inf]])
  top = scores.max(-1, keepdims=True) * powers.inner
  assert powers(scores, top).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
  assert powers(jnp.array([-jnp.inf]), jnp.array([steps.FLOOR])).tolist() == [0]


def test_what_is_flushed_to_zero_is_lost_in_rounding(monkeypatch):
  """Scores spread over hundreds of powers of two: values and gradients."""
  *arrays, d_out, d_lse = cases.operands(1, 64, 64, 2, 1, 16, 16)
  arrays[0] = arrays[0] * 60
  scores = np.einsum("bqnh,bkmh->bnqk", arrays[0], arrays[1]) * 0.25 * steps.LOG2E
  spread = scores - scores.max(-1, keepdims=True)
  assert ((spread > -149) & (spread < -126)).sum() > 100
  size = Size(16, 16)
  run = functools.partial(
    gpu.attention, scale=0.25, sizes=Sizes(size, size, size), interpret=True, logit_softcap=None
  )

  def found(least):
    """With powers below 2^least flushed: one program but for a number, so that no other rounds."""
    power = lambda x, factor, y: jnp.where(x * factor - y < least, 0.0, jnp.exp2(x * factor - y))
    monkeypatch.setattr(steps, "power", power)
    evaluate = jax.jit(functools.partial(cases.evaluate, run))
    return evaluate((*arrays, d_out, d_lse), {"mask": Causal()})

  for x, y in zip(found(-1000.0), found(-126.0), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * np.abs(y).max())
