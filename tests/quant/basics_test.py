import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from effjax.quant import basics

SCALES = {"tensor": (1, 1), "row": (8, 1), "channel": (1, 6), "group": (2, 6)}
MATRICES = {
  "bits": st.integers(2, 8),
  "granularity": st.sampled_from(basics.GRANULARITIES),
  "seed": st.integers(0, 999),
  "magnitude": st.sampled_from([1e-6, 1.0, 1e6]),
  "offset": st.sampled_from([0.0, 3.0, -3.0]),
}


def matrix(seed, magnitude, offset):
  rng = np.random.default_rng(seed)
  return ((rng.normal(size=(2, 8, 6)) + offset) * magnitude).astype(np.float32)


def spread(scale, shape):
  repeated = np.repeat(np.asarray(scale), shape[-2] // scale.shape[-2], axis=-2)
  return np.repeat(repeated, shape[-1] // scale.shape[-1], axis=-1)


@settings(max_examples=20, deadline=None)
@given(**MATRICES)
def test_symmetric_error_is_at_most_half_a_scale(bits, granularity, seed, magnitude, offset):
  w = matrix(seed, magnitude, offset)
  q, scale = basics.symmetric(jnp.asarray(w), bits=bits, granularity=granularity, group=4)
  assert scale.shape == (2, *SCALES[granularity])
  assert np.abs(np.asarray(q, int)).max() == 2 ** (bits - 1) - 1
  error = np.abs(np.asarray(basics.restore(q, scale)) - w)
  assert (error <= spread(scale, w.shape) * (0.5 + 1e-4)).all()


@settings(max_examples=20, deadline=None)
@given(**MATRICES)
def test_affine_error_is_at_most_half_a_scale_and_zero_exact(
  bits, granularity, seed, magnitude, offset
):
  w = matrix(seed, magnitude, offset)
  w[:, :2, 0] = 0.0
  q, scale, zero = basics.affine(jnp.asarray(w), bits=bits, granularity=granularity, group=4)
  assert scale.shape == zero.shape == (2, *SCALES[granularity])
  restored = np.asarray(basics.restore(q, scale, zero))
  assert (np.abs(restored - w) <= spread(scale, w.shape) * (0.5 + 1e-4)).all()
  assert (restored[:, :2, 0] == 0).all()
  assert np.asarray(q).max() <= 2**bits - 1


def test_finer_granularity_is_no_worse():
  w = matrix(0, 1.0, 0.0) * np.geomspace(0.01, 1, 6, dtype=np.float32)

  def error(granularity, group=4):
    q, scale = basics.symmetric(jnp.asarray(w), granularity=granularity, group=group)
    return np.square(np.asarray(basics.restore(q, scale)) - w).mean()

  assert error("group", 2) < error("group", 4) < error("channel") < error("tensor")


def test_affine_beats_symmetric_on_one_sided_values():
  w = matrix(0, 1.0, 0.0) ** 2
  symmetric, affine = (
    np.square(np.asarray(basics.restore(*function(jnp.asarray(w)))) - w).mean()
    for function in (basics.symmetric, basics.affine)
  )
  assert affine < 0.5 * symmetric


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_zeros_and_narrow_types_restore(dtype):
  w = jnp.asarray([[0, 3], [0, 0], [0, 0], [0, 0]], dtype)
  for parts in (basics.symmetric(w), basics.affine(w)):
    assert parts[1].dtype == jnp.float32
    restored = basics.restore(*parts, dtype=dtype)
    assert restored.dtype == dtype
    np.testing.assert_allclose(
      np.asarray(restored, np.float32), np.asarray(w, np.float32), rtol=4e-3
    )


def test_nan_is_not_hidden():
  w = jnp.array([[jnp.nan, 1], [1, 1]])
  restored = np.asarray(basics.restore(*basics.symmetric(w)))
  assert np.isnan(restored[:, 0]).all()
  assert not np.isnan(restored[:, 1]).any()


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_codes_equal_torch_per_channel_quantisation():
  torch = pytest.importorskip(
    "torch", reason="peer comparisons run on Python 3.11, which has torch"
  )
  w = matrix(1, 1.0, 0.0)[0]
  q, scale = basics.symmetric(jnp.asarray(w))
  peer = torch.quantize_per_channel(
    torch.from_numpy(w),
    torch.from_numpy(np.array(scale, np.float64)[0]),
    torch.zeros(6, dtype=torch.int64),
    axis=1,
    dtype=torch.qint8,
  )
  np.testing.assert_array_equal(q, peer.int_repr().numpy())
  np.testing.assert_allclose(basics.restore(q, scale), peer.dequantize().numpy(), rtol=1e-6)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"bits": 1}, "bits 1; allowed"),
    ({"bits": 9}, "bits 9; allowed"),
    ({"granularity": "block"}, "granularity 'block'; allowed: tensor"),
    ({"granularity": "group", "group": 3}, "group 3 does not divide the 8 rows"),
    ({"granularity": "group", "group": 0}, "group 0"),
  ],
)
@pytest.mark.parametrize("function", [basics.symmetric, basics.affine])
def test_bad_arguments_are_named(function, arguments, message):
  with pytest.raises(ValueError, match=message):
    function(jnp.ones((8, 6)), **arguments)
