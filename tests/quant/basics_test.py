import hypothesis.strategies as st
import jax
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


@pytest.mark.parametrize("function", [basics.symmetric, basics.affine])
def test_rounding_at_random_is_right_on_average(function):
  w = np.tile(matrix(0, 1.0, 0.5)[:1], (500, 1, 1))
  q, scale, *zero = function(jnp.asarray(w), bits=3, key=jax.random.key(0))
  restored = np.asarray(basics.restore(q, scale, *zero))
  step = spread(scale, w.shape)
  assert (np.abs(restored - w) <= step * (1 + 1e-4)).all()
  assert np.abs(restored.mean(0) - w[0]).max() < 5 * step.max() / np.sqrt(4 * 500)
  # To the nearest, many are off on average.
  nearest = np.asarray(basics.restore(*function(jnp.asarray(w), bits=3)))
  assert np.abs(nearest.mean(0) - w[0]).max() > 0.2 * step.max()


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


TYPES = {
  jnp.float16: st.sampled_from([6e-8, 1e-6, 1e-4, 1.0, 1e4]),
  jnp.bfloat16: st.sampled_from([1e-39, 1e-37, 1e-6, 1.0, 5e37]),
  jnp.float32: st.sampled_from([1e-42, 1e-37, 1e-6, 1.0, 5e37]),
}


@pytest.mark.parametrize("dtype", TYPES)
@settings(max_examples=12, deadline=None)
@given(data=st.data(), seed=st.integers(0, 999), bits=st.sampled_from([2, 8]))
def test_the_bound_holds_in_every_type_at_every_magnitude(dtype, data, seed, bits):
  w = matrix(seed, 1.0, data.draw(MATRICES["offset"]))
  w = jnp.asarray(np.asarray(w, np.float64) * data.draw(TYPES[dtype]), dtype).at[0, :, 1].set(0)
  exact = np.asarray(w, np.float64)
  reach = [np.abs(exact).max(1, keepdims=True)]
  reach.append(np.maximum(exact.max(1, keepdims=True), 0) - np.minimum(exact.min(1), 0)[:, None])
  found = basics.symmetric(w, bits=bits), basics.affine(w, bits=bits)
  for (q, scale, *zero), width, top in zip(found, reach, (2 ** (bits - 1), 2**bits), strict=True):
    assert scale.dtype == jnp.float32
    scale = np.asarray(scale, np.float64)
    steps = np.asarray(q, np.float64) - (np.asarray(zero[0]) if zero else 0)
    assert (np.abs(exact - steps * scale) <= scale * (0.5 + 1e-4)).all()
    wanted = np.maximum(width / (top - 1), 2.0**-125)
    np.testing.assert_allclose(scale, wanted, rtol=1e-6, atol=2.0**-126)


@pytest.mark.parametrize(
  ("scale_dtype", "step", "least"), [(jnp.float16, 2**-10, 2**-24), (jnp.bfloat16, 2**-7, 0)]
)
@pytest.mark.parametrize("magnitude", [1e-6, 1e-4, 1.0, 1e6])
def test_a_scale_of_16_bits_costs_what_is_said(scale_dtype, step, least, magnitude):
  w = matrix(0, magnitude, 3.0)
  reach = np.abs(w).max(1, keepdims=True)  # all entries of a channel have one sign, nearly
  for function, top in ((basics.symmetric, 127), (basics.affine, 255)):
    q, scale, *zero = function(jnp.asarray(w), scale_dtype=scale_dtype)
    assert scale.dtype == scale_dtype
    steps, scale = np.asarray(q, np.float64), np.asarray(scale, np.float64)
    steps -= np.asarray(zero[0]) if zero else 0
    assert (np.abs(w - steps * scale) <= scale * (0.5 + 1e-4)).all()
    assert (scale <= 1.3 * reach / top * (1 + step) + least).all()
    assert (np.abs(steps).max(1) > 0).all()


def test_what_a_scale_of_16_bits_cannot_hold_is_not_hidden():
  w = jnp.array([[1e-9, 1e8, 1.0, 0.0]])
  for function in (basics.symmetric, basics.affine):
    restored = np.asarray(basics.restore(*function(w, scale_dtype=jnp.float16)))
    np.testing.assert_array_equal(np.isnan(restored), [[True, True, False, False]])
    np.testing.assert_allclose(basics.restore(*function(w)), w, rtol=1e-6)


def test_float64_is_quantised_as_it_is():
  with jax.enable_x64(True):
    w = matrix(0, 1.0, 0.0).astype(np.float64) * [1e-300, 1e-37, 1.0, 1e30, 1e300, 0.0]
    q, scale = basics.symmetric(jnp.asarray(w), scale_dtype=jnp.float64)
    exact = np.asarray(q, np.float64) * np.asarray(scale)
    assert (np.abs(w - exact) <= np.asarray(scale) * (0.5 + 1e-9)).all()
    lost = np.isnan(basics.restore(*basics.symmetric(jnp.asarray(w))))
    np.testing.assert_array_equal(lost.all((0, 1)), [True, False, False, False, True, False])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 3)])
@pytest.mark.parametrize("granularity", ["tensor", "row", "channel"])
def test_empty_matrices_stay_empty(shape, granularity):
  for function in (basics.symmetric, basics.affine):
    parts = function(jnp.zeros(shape), granularity=granularity)
    assert basics.restore(*parts).shape == shape
    assert parts[0].shape == shape


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
    ({"scale_dtype": jnp.int8}, "scale_dtype int8; allowed: floating point"),
  ],
)
@pytest.mark.parametrize("function", [basics.symmetric, basics.affine])
def test_bad_arguments_are_named(function, arguments, message):
  with pytest.raises(ValueError, match=message):
    function(jnp.ones((8, 6)), **arguments)
