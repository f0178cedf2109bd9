"""Masks are sets: predicate, matrix, tile map and count agree, alone and composed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.attention.masks import Causal, Documents, Full, Mask, SlidingWindow

WIDTHS = st.one_of(st.none(), st.integers(0, 12))
LEAVES = st.one_of(
  st.just(Full()), st.just(Causal()), st.builds(SlidingWindow, left=WIDTHS, right=WIDTHS)
)


def composed(leaves):
  return st.recursive(
    leaves,
    lambda inner: st.one_of(
      st.builds(lambda a, b: a & b, inner, inner),
      st.builds(lambda a, b: a | b, inner, inner),
      st.builds(lambda a: ~a, inner),
    ),
    max_leaves=4,
  )


def matrix(mask: Mask, T: int, S: int) -> np.ndarray:
  q, k = np.arange(S - T, S)[:, None], np.arange(S)[None]
  return np.broadcast_to(mask.predicate(q, k), (T, S))


def statuses(seen: np.ndarray, block_q: int, block_k: int) -> np.ndarray:
  """Empty, partial, full by looking at every tile."""
  T, S = seen.shape
  tiles = [
    [seen[i : i + block_q, j : j + block_k] for j in range(0, S, block_k)]
    for i in range(0, T, block_q)
  ]
  return np.array([[int(t.any()) + int(t.all()) for t in row] for row in tiles])


def by_columns(blocks) -> np.ndarray:
  status = np.zeros_like(blocks.dense())
  column = np.repeat(np.arange(status.shape[1]), np.diff(blocks.columns.offset))
  status[blocks.columns.index, column] = 1 + blocks.columns.full
  return status


def test_definitions_by_enumeration():
  for T, S in ((7, 7), (4, 9)):
    for q in range(T):
      for k in range(S):
        at = q + S - T
        assert Full().dense(T, S)[q, k]
        assert Causal().dense(T, S)[q, k] == (k <= at)
        assert SlidingWindow(2, 1).dense(T, S)[q, k] == (at - 2 <= k <= at + 1)


def test_algebra_is_boolean():
  a, b = SlidingWindow(3, 1), Causal()
  x, y = a.dense(9), b.dense(9)
  np.testing.assert_array_equal((a & b).dense(9), x & y)
  np.testing.assert_array_equal((a | b).dense(9), x | y)
  np.testing.assert_array_equal((~a).dense(9), ~x)
  np.testing.assert_array_equal((~(a & b)).dense(9), (~a | ~b).dense(9))


def test_masks_compare_by_value_and_hash():
  assert (Causal() & SlidingWindow(4, 0)) == (Causal() & SlidingWindow(4, 0))
  assert len({Causal(), Causal(), SlidingWindow(1, 2), SlidingWindow(1, 2)}) == 2
  with pytest.raises(TypeError, match="unhashable"):
    hash(Causal() & Documents(jnp.zeros((1, 4), int)))


@settings(max_examples=150, deadline=None)
@given(
  composed(LEAVES), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)
)
def test_tile_map_never_skips_and_never_overstates(mask, T, S, block_q, block_k):
  """Exact or conservative: no tile with work is skipped, no tile is full that is not."""
  blocks = mask.blocks(T, S, block_q, block_k)
  want = statuses(matrix(mask, T, S), block_q, block_k)
  for got in (blocks.dense(), by_columns(blocks)):
    assert ((got == want) | (got == 1)).all()


@settings(max_examples=100, deadline=None)
@given(LEAVES, st.integers(1, 40), st.integers(0, 20), st.integers(1, 9), st.integers(1, 9))
def test_tile_map_of_one_mask_is_exact(mask, T, more, block_q, block_k):
  S = T + more
  blocks = mask.blocks(T, S, block_q, block_k)
  want = statuses(matrix(mask, T, S), block_q, block_k)
  np.testing.assert_array_equal(blocks.dense(), want)
  np.testing.assert_array_equal(by_columns(blocks), want)


def test_tile_map_of_a_causal_window_is_exact():
  mask = Causal() & SlidingWindow(30, 30)
  want = statuses(matrix(mask, 100, 100), 8, 16)
  np.testing.assert_array_equal(mask.blocks(100, 100, 8, 16).dense(), want)


@settings(max_examples=60, deadline=None)
@given(
  st.lists(st.integers(-1, 3), min_size=1, max_size=30), st.booleans(), st.integers(1, 7), st.data()
)
def test_tile_map_of_documents(ids, packed, block, data):
  ids = np.array([sorted(ids) if packed else ids])
  T = data.draw(st.integers(1, ids.shape[1]))
  mask = Documents(ids) & Causal()
  seen = (ids[0, -T:, None] == ids[0]) & (ids[0] >= 0) & matrix(Causal(), T, ids.shape[1])
  blocks = mask.blocks(T, ids.shape[1], block, block)
  want = statuses(seen, block, block)
  for got in (blocks.dense(), by_columns(blocks)):
    assert ((got == want) | (got == 1)).all()


def test_packed_documents_visit_only_their_own_tiles():
  ids = jnp.repeat(jnp.arange(8), 16)[None]
  blocks = Documents(ids).blocks(128, 128, 16, 16)
  np.testing.assert_array_equal(blocks.dense(), 2 * np.eye(8))


def test_documents_of_a_pair_index_their_own_axis():
  q_ids, k_ids = jnp.array([[1, -1]]), jnp.array([[0, 1, 1, -1]])
  got = Documents((q_ids, k_ids)).dense(2, 4)
  np.testing.assert_array_equal(got[0, 0], [[False, True, True, False], [False] * 4])
  np.testing.assert_array_equal(
    Documents((q_ids, k_ids)).blocks(2, 4, 1, 1).dense() > 0, np.asarray(got[0, 0])
  )


def test_documents_depend_on_the_batch_and_trace():
  ids = jnp.array([[0, 0, 1], [0, 1, 1]])
  dense = jax.jit(lambda mask: mask.dense(3))(Documents(ids) & Causal())
  assert dense.shape == (2, 1, 3, 3)
  want = (ids[:, :, None] == ids[:, None]) & jnp.tril(jnp.ones((1, 3, 3), bool))
  np.testing.assert_array_equal(dense[:, 0], want)


@settings(max_examples=50, deadline=None)
@given(composed(LEAVES), st.integers(1, 30))
def test_mean_keys_counts_the_matrix(mask, length):
  assert mask.mean_keys(length) == pytest.approx(matrix(mask, length, length).sum() / length)


def test_mean_keys_of_documents():
  assert Documents(jnp.array([[0, 0, 1, -1]])).mean_keys(4) == pytest.approx(5 / 4)


def test_a_million_positions_need_no_square():
  blocks = (Causal() & SlidingWindow(4096, 0)).blocks(2**20, 2**20, 512, 512)
  # Row i of tiles sees tiles max(i − 8, 0) … i: 9 each, less the 36 that the start lacks.
  assert blocks.rows.visited == blocks.columns.visited == 9 * 2048 - 36


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match="left=-1"):
    SlidingWindow(-1, 0)
  with pytest.raises(ValueError, match="block_q=0"):
    Causal().blocks(4, 4, 0, 4)
  with pytest.raises(ValueError, match=r"\(1, 3\).*expected \(1, 4\)"):
    Documents(jnp.zeros((1, 3), int)).blocks(4, 4, 2, 2)
