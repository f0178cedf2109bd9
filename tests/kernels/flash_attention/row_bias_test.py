"""A bias shared along the keys, which every implementation keeps out of its kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention.masks import Causal, SlidingWindow
from effjax.kernels.flash_attention import cases, reference, row_bias
from effjax.kernels.flash_attention.fused import gpu, tpu
from effjax.kernels.flash_attention.tiled import xla

B, T, S, N = 2, 20, 13, 4
PLATFORMS = {
  "xla": xla.attention,
  "gpu": functools.partial(gpu.attention, interpret=True),
  "tpu": functools.partial(tpu.attention, interpret=True),
}


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 20, 1), (1, 4, 1, 1)])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_values_and_gradients(platform, shape):
  """Where some queries see nothing by the mask, and some by a bias of −inf."""
  arrays = cases.operands(B, T, S, N, 2, 8, 8, shape, rng=3)
  arrays[3] = arrays[3].at[:, :, 15:].set(-jnp.inf) if shape[2] > 1 else arrays[3]
  where, options = {"mask": Causal() & SlidingWindow(4, 0)}, {"scale": 0.4, "logit_softcap": 1.5}
  run = functools.partial(cases.evaluate, functools.partial(PLATFORMS[platform], **options))
  errors = cases.errors(jax.jit(run)(arrays, where), cases.exact(**options)(arrays, where))
  assert max(errors.values()) < 2e-6, errors


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_gradient_in_half_precision_is_no_difference_of_greater_numbers(platform):
  """Rows of scores have gradients of 16 that cancel to the log-sum-exp's, here one in a hundred."""
  *arrays, d_out, d_lse = cases.operands(1, 64, 64, 2, 1, 16, 16, (1, 1, 1, 1), "bfloat16")
  arrays = *arrays, 16 * d_out, jnp.full_like(d_lse, 0.01)
  run = functools.partial(cases.evaluate, functools.partial(PLATFORMS[platform], scale=1.0))
  d_bias = jax.jit(run)(arrays, {"mask": Causal()})[-1]
  assert d_bias.item() == pytest.approx(64 * 2 * 0.01, rel=5e-3)


def test_cotangents_that_cancel_are_summed_in_pairs():
  """Of 468 random ones, to a third of what one running sum leaves."""
  zeros = jnp.zeros((2, 39, 6))
  attention = row_bias.outside(lambda: (zeros[..., None], zeros))
  backward = jax.jit(jax.vjp(lambda bias: attention(bias=bias), jnp.ones((1, 1, 1, 1)))[1])
  d_lse = np.random.default_rng(0).normal(size=(12, *zeros.shape)).astype(np.float32)
  d_bias = np.array([backward((zeros[..., None], x))[0].item() for x in d_lse])
  error = d_bias - d_lse.astype(np.float64).sum((1, 2, 3))
  assert np.sqrt(np.mean(error**2)) < 3e-6


def test_tangents():
  *inputs, _, _ = cases.operands(B, T, S, N, 2, 8, 8, (2, 4, 20, 1))
  moves = [jnp.cos(x) for x in inputs]
  move = lambda attention: jax.jvp(
    lambda q, k, v, b: attention(q, k, v, bias=b, mask=Causal(), scale=0.4), inputs, moves
  )
  got, want = (jax.jit(functools.partial(move, f))() for f in (xla.attention, reference.attention))
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    finite = jnp.isfinite(y)
    assert (jnp.isfinite(x) == finite).all()
    assert jnp.allclose(jnp.where(finite, x, 0), jnp.where(finite, y, 0), atol=2e-5)
