import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.cluster.vq

from effjax.kernels.quantized_matmul import Indices
from effjax.quant import Palette, kmeans


def error(points, centres, index):
  return np.square(np.asarray(points) - np.asarray(centres)[np.asarray(index)]).sum()


def test_k_means_ends_where_scipys_stays():
  points = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
  centres, index = kmeans(points, 5, steps=60)
  theirs, labels = scipy.cluster.vq.kmeans2(points, np.asarray(centres), iter=5, minit="matrix")
  np.testing.assert_allclose(centres, theirs, atol=1e-4)
  np.testing.assert_array_equal(index, labels)


def test_few_numbers_are_near_the_best_of_all_splits():
  points = np.sort(np.random.default_rng(1).normal(size=24)).astype(np.float32)
  best = min(
    sum(np.square(part - part.mean()).sum() for part in np.split(points, cuts))
    for cuts in itertools.combinations(range(1, 24), 3)
  )
  centres, index = kmeans(points[:, None], 4)
  found = error(points[:, None], centres, index)
  assert best * (1 - 1e-5) <= found <= best * 1.2


@pytest.mark.parametrize("colours", [1, 5, 8])
def test_few_different_points_are_centres(colours):
  """However often each occurs, and beside others that are far away."""
  rng = np.random.default_rng(4)
  kinds = rng.integers(0, 255, (5, 3)).astype(np.float32)
  kinds[:2] = [[10, 10, 10], [10, 10, 11]]
  points = np.repeat(kinds[:colours], [3000, 1, 500, 2, 1][:colours], axis=0)
  centres, index = kmeans(rng.permutation(points), colours, steps=2)
  np.testing.assert_array_equal(np.unique(np.asarray(centres)[np.asarray(index)], axis=0),
                                np.unique(points, axis=0))  # fmt: skip


@pytest.mark.parametrize("numbers", [1, 2, 3, 4])
def test_a_matrix_of_few_numbers_is_exact(numbers):
  w = np.random.default_rng(2).choice([-3.0, 0.25, 0.5, 7.0][:numbers], (2, 16, 6))
  w[:, 0, 0] = -3.0
  found = Palette.quantize(w.astype(np.float32), bits=2)
  np.testing.assert_array_equal(found.materialize(), w.astype(np.float32))


def test_more_steps_and_colours_are_no_worse():
  w = np.random.default_rng(3).normal(size=(64, 16)).astype(np.float32)
  off = lambda **options: np.square(np.asarray(Palette.quantize(w, **options)) - w).sum()
  assert off(steps=30) < off(steps=1) < off(steps=0)
  assert off(bits=4) < off(bits=3)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_any_bits_are_packed_and_come_back(bits):
  codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3, 16))
  packed = np.asarray(jax.jit(Indices(bits).pack)(jnp.asarray(codes)))
  flat = codes.reshape(6, 16)
  expected = [np.packbits([int(bit) for code in row for bit in f"{code:0{bits}b}"]) for row in flat]
  np.testing.assert_array_equal(packed.reshape(6, -1), expected)
  np.testing.assert_array_equal(Indices(bits).codes(jnp.asarray(packed)), codes)


def test_each_matrix_has_its_own_colours_and_a_table_its_rows():
  w = np.random.default_rng(4).normal(size=(2, 16, 8)).astype(np.float32) * [[[1.0]], [[9.0]]]
  both = Palette.quantize(w.astype(np.float32), bits=3)
  alone = Palette.quantize(w[1].astype(np.float32), bits=3)
  np.testing.assert_array_equal(both.materialize()[1], alone.materialize())
  table = Palette.quantize(w[1].T.astype(np.float32), bits=3, table=True)
  np.testing.assert_array_equal(table.take(jnp.array([7, 0])), np.asarray(alone).T[[7, 0]])


@pytest.mark.parametrize(
  ("w", "options", "message"),
  [
    (jnp.ones((8, 4)), {"bits": 9}, "bits 9; allowed"),
    (jnp.ones((8, 4)), {"bits": 0}, "bits"),
    (jnp.ones((12, 4)), {}, "block 8 does not divide the 12 inputs"),
    (jnp.full((8, 4), jnp.nan), {}, "w has NaN"),
  ],
)
def test_bad_arguments_are_named(w, options, message):
  with pytest.raises(ValueError, match=message):
    Palette.quantize(w, **options)


def test_points_that_are_none_are_refused():
  with pytest.raises(ValueError, match="points has shape"):
    kmeans(jnp.ones((0, 3)), 2)
  with pytest.raises(ValueError, match="colours"):
    kmeans(jnp.ones((2, 3)), 0)
