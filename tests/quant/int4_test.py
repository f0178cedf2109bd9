import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.quant import Int4, Int4Affine


def matrix(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("symmetric", [True, False])
def test_error_is_at_most_half_a_scale(symmetric):
  w = matrix(2, 24, 10) + 0.5
  found = Int4.quantize(w, group=8, symmetric=symmetric)
  assert type(found) is (Int4 if symmetric else Int4Affine)
  scale = np.repeat(np.asarray(found.scale), 8, -1).swapaxes(1, 2)
  assert (np.abs(np.asarray(found) - w) <= scale * (0.5 + 1e-4)).all()
  groups = w.reshape(2, 3, 8, 10)
  reach = np.abs(groups).max(2) / 7
  if not symmetric:
    reach = (np.maximum(groups.max(2), 0) - np.minimum(groups.min(2), 0)) / 15
  np.testing.assert_allclose(found.scale, reach.swapaxes(1, 2), rtol=1e-6)


def test_what_lies_in_memory_is_rows_of_outputs_two_codes_to_a_byte():
  w = jnp.asarray(np.arange(-7, 9)[:, None].clip(max=7), jnp.float32)
  found = Int4.quantize(w, group=16)
  assert found.scale.tolist() == [[1.0]]
  assert found.codes[0, :3].tolist() == [0x12, 0x34, 0x56]
  np.testing.assert_array_equal(found.materialize(), w)
  table = Int4.quantize(w.T, group=16, table=True)
  np.testing.assert_array_equal(table.codes, found.codes)
  np.testing.assert_array_equal(table.T.materialize(), w)


def test_zero_is_exact_where_a_group_has_a_zero_point():
  w = matrix(16, 4) ** 2
  w[3] = 0
  found = np.asarray(Int4Affine.quantize(w, group=4, scale_dtype=jnp.bfloat16))
  assert (found[3] == 0).all()
  assert np.square(found - w).sum() < np.square(np.asarray(Int4.quantize(w, group=4)) - w).sum()


def test_it_runs_under_jit_and_keeps_the_type():
  w = jnp.asarray(matrix(16, 4), jnp.bfloat16)
  found = jax.jit(lambda w: Int4.quantize(w, group=4))(w)
  assert found.dtype == found.materialize().dtype == jnp.bfloat16
  assert found.T.T.table is False and found.T.shape == (4, 16)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"group": 5}, "group 5; allowed: even"),
    ({"group": 12}, "group 12 does not divide the 16 inputs"),
    ({}, "group 64 does not divide the 16 inputs"),
    ({"group": 4, "scale_dtype": jnp.int8}, "scale_dtype int8"),
  ],
)
def test_bad_arguments_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    Int4.quantize(jnp.ones((16, 4)), **options)
