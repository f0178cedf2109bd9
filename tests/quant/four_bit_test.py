"""NF4, FP4 and the double quantisation of their scales, beside bitsandbytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import trees
from effjax.quant import FP4, NF4, Dynamic8
from effjax.quant.dynamic8 import signed_map

KINDS = {"nf4": NF4, "fp4": FP4}
D, F = 192, 40


@pytest.fixture(scope="module")
def bnb():
  reason = "peer comparisons run on Python 3.11, which has torch"
  pytest.importorskip("torch", reason=reason)
  return pytest.importorskip("bitsandbytes", reason=reason).functional


def matrix(seed=0):
  """[D, F] float32 with a block of zeros, a tie, and tiny and large blocks."""
  w = np.random.default_rng(seed).normal(size=(D, F)).astype(np.float32) * 0.02
  w[:64, 3], w[64:128, 4], w[:64, 5] = 0, w[64:128, 4] * 1e-30, w[:64, 5] * 1e30
  w[:3, 0] = [1.0, 0.5 * np.float32(0.07958029955625534), -0.03125]
  return w


def theirs(bnb, w, kind, **options):
  import torch

  lying = torch.from_numpy(np.ascontiguousarray(np.asarray(w).T))
  return bnb.quantize_4bit(lying, quant_type=kind, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [32, 64])
def test_codes_scales_and_numbers_are_bitsandbytes_to_the_bit(bnb, kind, block):
  w = matrix()
  codes, state = theirs(bnb, w, kind, blocksize=block)
  ours = KINDS[kind].quantize(w, block=block)
  np.testing.assert_array_equal(ours.codes.ravel(), codes.numpy().ravel())
  np.testing.assert_array_equal(ours.scale.ravel(), state.absmax.numpy())
  np.testing.assert_array_equal(ours.materialize(), bnb.dequantize_4bit(codes, state).numpy().T)


@pytest.mark.parametrize("outputs", [64, 300])
def test_double_quantised_scales_are_bitsandbytes_to_the_bit(bnb, outputs):
  random = np.random.default_rng(0)
  w = random.uniform(-0.5, 0.5, (128, outputs)).astype(np.float32)
  # Scales whose mean is the same in whatever order they are added; the last block may be short.
  w[::64] = random.integers(64, 128, (2, outputs)) / 128
  codes, state = theirs(bnb, w, "nf4", compress_statistics=True)
  ours = NF4.quantize(w, double=True)
  assert float(ours.scale.offset[0, 0]) == state.offset.item()
  np.testing.assert_array_equal(ours.codes.ravel(), codes.numpy().ravel())
  np.testing.assert_array_equal(ours.scale.codes.ravel(), state.absmax.numpy())
  np.testing.assert_array_equal(ours.scale.coarse.ravel(), state.state2.absmax.numpy())
  expected = bnb.dequantize_4bit(codes, state).numpy().T
  np.testing.assert_allclose(ours.materialize(), expected, rtol=1e-6, atol=1e-7)


def test_the_map_of_scales_is_that_of_bitsandbytes(bnb):
  np.testing.assert_array_equal(signed_map(), bnb.create_dynamic_map().numpy())
  assert -1 not in signed_map() and {0, 1} < set(signed_map())


def test_constants_cost_what_the_paper_says():
  """0.5 bit a parameter, or 8/64 + 32/(64 · 256) = 0.127 (arXiv 2305.14314, section 3)."""
  shape = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
  for double, bits in ((False, 0.5), (True, 8 / 64 + 32 / (64 * 256))):
    found = jax.eval_shape(lambda w, double=double: NF4.quantize(w, double=double), shape)
    constants = trees.nbytes(found.scale) - (4 if double else 0)  # less the one offset
    assert 8 * constants / 4096**2 == bits
  assert round(bits, 3) == 0.127


@pytest.mark.parametrize("cls", KINDS.values())
@pytest.mark.parametrize("double", [False, True])
def test_error_is_at_most_half_the_widest_gap(cls, double):
  w = np.random.default_rng(1).normal(size=(2, 128, 24)).astype(np.float32)
  found = cls.quantize(w, double=double)
  numbers = np.sort(cls.codebook)
  scale = np.abs(w.reshape(2, 2, 64, 24)).max(2)
  bound = np.repeat(scale, 64, 1) * (np.diff(numbers).max() / 2 + 1e-6)
  if double:
    stored = np.asarray(found.scale.materialize()).swapaxes(1, 2)
    bound = bound + np.abs(np.repeat(stored - scale, 64, 1))
    assert np.abs(stored - scale).max() < 0.02
  assert (np.abs(np.asarray(found) - w) <= bound).all()


def test_leading_axes_are_a_batch_and_tables_lie_by_rows():
  w = np.random.default_rng(2).normal(size=(3, 64, 16)).astype(np.float32)
  many, one = (NF4.quantize(x, double=True) for x in (w, w[1]))
  for a, b in zip(*map(jax.tree.leaves, (jax.tree.map(lambda x: x[1], many), one)), strict=True):
    np.testing.assert_array_equal(a, b)
  table = NF4.quantize(w[1].T, double=True, table=True)
  assert table.shape == (16, 64)
  np.testing.assert_array_equal(table.materialize().T, one.materialize())
  ids = jnp.array([[0, 15], [3, 3]])
  np.testing.assert_array_equal(table.take(ids), np.asarray(table)[np.asarray(ids)])


def test_a_table_reads_no_more_than_its_rows():
  table = NF4.quantize(jnp.ones((512, 64)), double=True, table=True)
  sizes = [
    v.aval.size
    for eqn in jax.make_jaxpr(lambda t, i: t.take(i))(table, jnp.array([3])).eqns
    for v in eqn.outvars
  ]
  assert max(sizes) <= 4 * 64 * 16


def test_numbers_between_blocks_go_on_from_row_to_row():
  w = np.random.default_rng(3).uniform(1, 2, (7, 100)).astype(np.float32)
  found = Dynamic8.quantize(jnp.asarray(w))
  assert found.coarse.shape == (1, 3)
  np.testing.assert_allclose(found.materialize(), w, atol=0.02)
  np.testing.assert_array_equal(found.take(jnp.array([6, 0])), np.asarray(found)[[6, 0]])


@pytest.mark.parametrize("cls", KINDS.values())
@pytest.mark.parametrize(
  ("w", "options", "message"),
  [
    (
      jnp.ones((100, 4)),
      {},
      "block 64 does not divide the 100 inputs of w",
    ),
    (jnp.ones((64, 100)), {"table": True}, "block 64 does not divide the 100 inputs"),
    (jnp.ones((9, 4)), {"block": 3}, "block 3; allowed: even numbers"),
    (jnp.ones((64, 4)), {"block": 0}, "block 0 does not divide"),
    (jnp.ones((64, 4), int), {}, r"w is int32\[64, 4\]; allowed: matrices"),
    (jnp.full((64, 4), jnp.nan), {}, "w has NaN"),
    (jnp.full((64, 4), jnp.inf), {"double": True}, "w has NaN, infinity"),
  ],
)
def test_bad_arguments_are_named(cls, w, options, message):
  with pytest.raises(ValueError, match=message):
    cls.quantize(w, **options)


def test_constants_that_do_not_fit_are_named():
  with pytest.raises(ValueError, match=r"NF4: a constant has shape \(4, 2\); allowed: \(4, 1\)"):
    NF4(jnp.ones((4, 32), jnp.uint8), jnp.ones((4, 2)))
  with pytest.raises(ValueError, match=r"NF4: codes are int8\[4, 32\]; allowed: uint8"):
    NF4(jnp.ones((4, 32), jnp.int8), jnp.ones((4, 1)))
