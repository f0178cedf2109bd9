"""What attention is given at the edges: other kinds of arrays, huge widths, odd types."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import attend, masks
from effjax.attention.masks import Causal, Documents, Full, Global, Prefix, RandomBlocks

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
RNG = np.random.default_rng(0)
B, T, N, H = 2, 20, 2, 4
Q, K, V = (RNG.normal(size=(B, T, N, H)).astype(np.float32) for _ in range(3))


def exact(query, key, value, seen, bias=0.0):
  """Attention in float64."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  scores = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1]) + bias
  weights = np.exp(scores - scores.max(-1, keepdims=True)) * seen
  weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
  return np.einsum("bnts,bsnh->btnh", weights, value)


def causal(T, S):
  return np.arange(S) <= np.arange(S - T, S)[:, None]


@IMPLEMENTATIONS
def test_arrays_of_numpy(implementation):
  """They work eagerly, and where a program is traced for another argument."""
  ids = np.repeat([[0, 1]], T // 2, axis=1).reshape(1, T).repeat(B, 0)
  run = functools.partial(attend, implementation=implementation)
  given = {"mask": Causal(), "segment_ids": ids, "bias": np.zeros((1, 1, T, T))}
  y = jax.jit(lambda q: run(q, K, V, **given, sinks=np.full(N, -1e9)))(Q)
  want = exact(Q, K, V, causal(T, T) & (ids[0] == ids[0][:, None]))
  np.testing.assert_allclose(y, want, atol=1e-5)
  assert isinstance(y, jax.Array)
  positions = np.arange(T)[None]
  there = run(Q, K, V, mask=Causal(), query_positions=positions)
  np.testing.assert_allclose(there, exact(Q, K, V, causal(T, T)), atol=1e-5)


@IMPLEMENTATIONS
@pytest.mark.parametrize("kinds", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_keys_and_values_are_taken_in_the_type_of_queries(implementation, kinds):
  first, rest = map(jnp.dtype, kinds)
  y = attend(Q.astype(first), K.astype(rest), V.astype(rest), implementation=implementation)
  assert y.dtype == first
  np.testing.assert_allclose(np.asarray(y, np.float32), exact(Q, K, V, np.ones((T, T))), atol=0.05)


HUGE = {
  "window": (masks.SlidingWindow(2**31 - 1, 0), causal(T, T)),
  "both": (masks.SlidingWindow(2**31 - 1, 2**40), np.ones((T, T), bool)),
  "dilated": (masks.Dilated(2**31, 2), (np.arange(T) - np.arange(T)[:, None]) % 2 == 0),
  "far apart": (masks.Dilated(3, 2**33), np.eye(T, dtype=bool)),
  "blocks": (masks.BlockWindow(2**31, 0, 4), np.arange(T) // 4 <= np.arange(T)[:, None] // 4),
  "one block": (masks.BlockWindow(2**20, 2**31, 2**34), np.ones((T, T), bool)),
}


@IMPLEMENTATIONS
@pytest.mark.parametrize("case", HUGE)
def test_a_huge_width_is_none(case, implementation):
  mask, seen = HUGE[case]
  np.testing.assert_array_equal(mask.dense(T), seen)
  y = attend(Q, K, V, mask=mask, implementation=implementation)
  np.testing.assert_allclose(y, exact(Q, K, V, seen), atol=1e-5)


@IMPLEMENTATIONS
@pytest.mark.parametrize("at", [2**31 - 1, -(2**31), -1, T])
def test_positions_that_are_no_slots(at, implementation):
  """Bands compare them; of what is said of single tokens nothing is true."""
  positions = np.full((B, T), at, np.int32)
  run = functools.partial(attend, Q, K, V, query_positions=positions, implementation=implementation)
  band = np.full((T, T), at > 0)
  np.testing.assert_allclose(run(mask=Causal()), exact(Q, K, V, band), atol=1e-5)
  ids = jnp.zeros((B, T), jnp.int32)
  assert not run(mask=Documents(ids)).any()
  assert not run(segment_ids=ids).any()
  listed = Global(jnp.array([[0, 3]]))
  seen = np.isin(np.arange(T), [0, 3]) & np.ones((T, 1), bool)
  np.testing.assert_allclose(run(mask=listed), exact(Q, K, V, seen), atol=1e-5)
  table = jnp.zeros((1, 1, 5, 1), jnp.int32)
  assert not run(mask=RandomBlocks(table, 4)).any()


@pytest.mark.parametrize("at, seen", [(2**32 + 3, 1), (-(2**32) + 3, 0)])
def test_positions_of_64_bits_are_as_far_as_they_say(at, seen):
  y = attend(Q, K, V, mask=Causal(), query_positions=np.full((B, T), at))
  np.testing.assert_allclose(y, exact(Q, K, V, np.full((T, T), seen)), atol=1e-5)


@IMPLEMENTATIONS
def test_more_queries_than_keys(implementation):
  """The first of them are before all keys."""
  y = attend(Q, K[:, :6], V[:, :6], mask=Causal(), implementation=implementation)
  np.testing.assert_allclose(y, exact(Q, K[:, :6], V[:, :6], causal(T, 6)), atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
def test_a_bias_of_any_floating_type(kind, implementation):
  bias = RNG.normal(size=(1, N, T, T)).astype(jnp.dtype(kind))
  y = attend(Q, K, V, bias=bias, implementation=implementation)
  np.testing.assert_allclose(y, exact(Q, K, V, 1, np.asarray(bias, np.float64)), atol=1e-5)


IDS = jnp.zeros((B, T), jnp.int32)
WIDE = np.where(np.arange(T) < 5, 0, 2**32)[None].repeat(B, 0)
REFUSED = {
  "list": (lambda: attend(Q.tolist(), K, V), "query is list, expected an array"),
  "integers": (lambda: attend(Q, K.astype(int), V), "key has type int64, expected floating"),
  "axes": (lambda: attend(np.ones((2, 3, 24, 8)), np.ones((2, 2, 24, 8)), np.ones((2, 2, 24, 8))[
    :, :, :16]), "expected those of key"),
  "heads": (lambda: attend(Q, K[:, :, :1].repeat(3, 2), V), r"\[length, heads\]"),
  "boolean bias": (lambda: attend(Q, K, V, bias=np.ones((1, 1, T, T), bool)),
                   "bias has type bool, expected floating point.*mask="),
  "integer bias": (lambda: attend(Q, K, V, bias=jnp.ones((1, 1, T, T), int)), "bias has type int"),
  "ids of lists": (lambda: attend(Q, K, V, segment_ids=[[0] * T] * B), "expected an integer array"),
  "boolean ids": (lambda: attend(Q, K, V, segment_ids=IDS > 0), "have type bool"),
  "wide ids": (lambda: attend(Q, K, V, segment_ids=WIDE), r"the keys: 4294967296 at \[0, 5\]"),
  "wide documents": (lambda: attend(Q, K, V, mask=Documents(WIDE)), "4294967296 at"),
  "one of a pair": (lambda: attend(Q, K, V, segment_ids=(IDS, None)), "the keys' are None"),
  "positions": (lambda: attend(Q, K, V, query_positions=np.ones((B, T))), "of float64, expected"),
  "documents": (lambda: attend(Q, K[:, :6], V[:, :6], mask=Documents(IDS[:, :6])), "give a pair"),
  "document ids": (lambda: attend(Q, K, V, mask=Documents(IDS + 0.5)), "Documents of the keys"),
  "blocks": (lambda: attend(Q, K, V, mask=RandomBlocks(jnp.ones((1, 1, 5, 1)), 4)), "table"),
  "block": (lambda: RandomBlocks(jnp.ones((1, 1, 5, 1), int), 0), "block=0 must be 1 or more"),
  "far block": (lambda: RandomBlocks(jnp.ones((1, 1, 5, 1), int), 2**31), "block=2147483648"),
  "boolean width": (lambda: masks.SlidingWindow(True, 0), "left=True must be 0"),
  "prefix": (lambda: attend(Q, K, V, mask=Prefix(2**31)), "Prefix of 2147483648; allowed: 0 … 20"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_none_of_these_is_named(case):
  call, message = REFUSED[case]
  with pytest.raises(ValueError, match=message):
    call()


def test_a_mask_is_neither_true_nor_false():
  for wrong in (
    lambda: Causal() and Prefix(4),
    lambda: Causal() or Full(),
    lambda: not Causal(),
    lambda: Causal() & np.ones((3, 3), bool),
    lambda: True | Causal(),
    lambda: Causal() < Full(),
  ):
    with pytest.raises(TypeError, match=r"&, [|] and ~|unsupported operand|not supported"):
      wrong()


def test_masks_that_hold_arrays_compare_without_an_error():
  listed = Global(jnp.array([[1, 2]]))
  assert listed == listed
  assert listed == Global(jnp.array([[1, 2]])) and listed != Global(jnp.array([[1, 3]]))
  assert Global((1, 2)) == Global((1, 2)) and Global(2) != Prefix(2)
  assert listed not in (Causal(), Full())
