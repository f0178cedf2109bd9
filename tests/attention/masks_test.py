"""Masks are sets: predicate, matrix, tile map and count agree, alone and composed."""

import operator
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.attention.masks import (
  BlockWindow,
  Causal,
  Dilated,
  Documents,
  Full,
  Global,
  Mask,
  PerHead,
  Predicate,
  Prefix,
  RandomBlocks,
  Shard,
  SlidingWindow,
  bigbird,
  longformer,
)

WIDTHS = st.one_of(st.none(), st.integers(0, 12))
SMALL = st.integers(0, 4)
BANDS = st.one_of(
  st.just(Full()), st.just(Causal()), st.builds(SlidingWindow, left=WIDTHS, right=WIDTHS)
)
EXACT = BANDS | st.builds(BlockWindow, left=SMALL, right=SMALL, block=st.integers(1, 5))
LEAVES = st.one_of(
  EXACT,
  st.builds(Prefix, length=st.just(1)),
  st.builds(Global, positions=st.sampled_from([0, 1, (), (0,)])),
  st.builds(Dilated, window=SMALL, dilation=st.integers(1, 4)),
  st.builds(Predicate, function=st.just(lambda q, k: (q + k) % 3 != 0), visited=BANDS),
)

BIGBIRD = jax.tree.map(np.asarray, bigbird(jax.random.key(0), 40, block=5, number=1))


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
  return np.broadcast_to(np.asarray(mask.dense(T, S)), (T, S))


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
  definitions = {
    Full(): lambda at, k: True,
    Causal(): lambda at, k: k <= at,
    SlidingWindow(2, 1): lambda at, k: at - 2 <= k <= at + 1,
    BlockWindow(1, 0, 3): lambda at, k: 0 <= at // 3 - k // 3 <= 1,
    Dilated(2, 2): lambda at, k: abs(at - k) in (0, 2, 4),
    Prefix(3): lambda at, k: k < 3,
    Global(2): lambda at, k: at < 2 or k < 2,
    Global((1, 5)): lambda at, k: at in (1, 5) or k in (1, 5),
  }
  for T, S in ((7, 7), (4, 9)):
    for mask, sees in definitions.items():
      want = [[sees(q + S - T, k) for k in range(S)] for q in range(T)]
      np.testing.assert_array_equal(mask.dense(T, S), want)


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


def test_numbers_of_numpy_are_numbers():
  assert Prefix(np.int64(2)) == Prefix(2) and Global(np.int32(2)) == Global(2)
  assert not jax.tree.leaves((Prefix(np.int64(2)), Global((np.int64(1),))))


HOLDING = {
  "documents": Documents,
  "a pair": lambda ids: Documents((ids, ids)),
  "global": Global,
  "prefix": lambda ids: Prefix(ids[0]),
  "random blocks": lambda ids: RandomBlocks(ids[None, None], 2),
  "predicate": lambda ids: Predicate(operator.gt, keys={"ids": ids[None]}),
}


@pytest.mark.parametrize("hold", HOLDING.values(), ids=HOLDING)
def test_masks_that_hold_arrays_compare_by_their_values(hold):
  """Alone and in others, of numpy and of JAX; what is traced has no value."""
  ids = np.array([[0, 1, 3]], np.int32)
  for wrap in (lambda mask: mask, lambda mask: ~(Causal() & mask)):
    same = [wrap(hold(x)) for x in (ids, ids.copy(), jnp.asarray(ids))]
    others = [wrap(hold(x)) for x in (ids + 1, ids[:, ::-1], np.int64(ids), ids[:, :2])]
    assert len({*same, *others}) == 1 + len(others)
    assert same[0] == same[2] and all(same[0] != other for other in others)

  @jax.jit
  def traced(ids):
    mask = hold(ids)
    assert mask == jax.tree.map(lambda x: x, mask) != hold(ids + 0)
    with pytest.raises(TypeError, match="holds arrays that are traced"):
      hash(mask)

  traced(ids)


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
@given(EXACT, st.integers(1, 40), st.integers(0, 20), st.integers(1, 9), st.integers(1, 9))
def test_tile_map_of_one_mask_is_exact(mask, T, more, block_q, block_k):
  S = T + more
  blocks = mask.blocks(T, S, block_q, block_k)
  want = statuses(matrix(mask, T, S), block_q, block_k)
  np.testing.assert_array_equal(blocks.dense(), want)
  np.testing.assert_array_equal(by_columns(blocks), want)


@settings(max_examples=60, deadline=None)
@given(
  composed(LEAVES | st.just(BIGBIRD)),
  st.tuples(st.integers(0, 30), st.integers(0, 30)),
  st.integers(1, 10),
  st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_a_shard_is_a_rectangle_of_the_matrix(mask, start, size, block):
  query, key = start
  shard = Shard(mask, query, key, 40)
  want = np.broadcast_to(mask.dense(40), (1, 1, 40, 40))[0, 0, query:, key:][:size, :size]
  np.testing.assert_array_equal(shard.dense(size)[0, 0], want)
  got, want = shard.blocks(size, size, *block).dense(), statuses(want, *block)
  assert ((got == want) | (got == 1)).all()


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


@settings(max_examples=50, deadline=None)
@given(composed(LEAVES), st.integers(1, 30), st.data())
def test_mean_keys_of_the_last_queries_counts_their_rows(mask, length, data):
  queries = data.draw(st.integers(1, length))
  rows = matrix(mask, length, length)[-queries:]
  assert mask.mean_keys(length, queries) == pytest.approx(rows.sum() / queries)


def test_mean_keys_of_one_query_of_a_long_sequence():
  window = Causal() & (SlidingWindow(255, 0) | Global(4))
  assert window.mean_keys(100_000, 1) == 260
  assert (Dilated(8, 100) & Causal()).mean_keys(100_000, 1) == 9  # not exact: one row written out
  assert Full().mean_keys(100_000, 1) == 100_000


@pytest.mark.parametrize("queries", [0, 5])
def test_mean_keys_of_more_queries_than_there_are(queries):
  with pytest.raises(ValueError, match=f"queries={queries}; allowed: 1 … length, 4"):
    Causal().mean_keys(4, queries)


def test_mean_keys_of_documents():
  assert Documents(jnp.array([[0, 0, 1, -1]])).mean_keys(4) == pytest.approx(5 / 4)


@pytest.mark.parametrize("positions", [3, (1, 17, 30), jnp.array([[30, 1, -1, 17]])])
@pytest.mark.parametrize("block", [4, 7])
def test_tile_map_of_global_tokens(positions, block):
  mask = Global(positions)
  seen = np.broadcast_to(mask.dense(40), (1, 1, 40, 40))[0, 0]
  marked = [0, 1, 2] if isinstance(positions, int) else [1, 17, 30]
  want = np.zeros((40, 40), bool)
  want[marked], want[:, marked] = True, True
  np.testing.assert_array_equal(seen, want)
  got, want = mask.blocks(40, 40, block, block).dense(), statuses(seen, block, block)
  np.testing.assert_array_equal(got > 0, want > 0)
  assert (got <= np.maximum(want, 1)).all()


def test_prefix_and_global_tokens_differ_across_the_batch():
  causal, at = Causal().dense(4), np.arange(4)
  prefix = Causal() | Prefix(jnp.array([0, 3]))
  np.testing.assert_array_equal(prefix.dense(4)[:, 0], np.stack([causal, causal | (at < 3)[None]]))
  ids = jnp.array([[0, -1], [2, 3]])
  dense = jax.jit(lambda mask: mask.dense(4))(Global(ids))
  for row, marked in zip(dense[:, 0], ([0], [2, 3]), strict=True):
    want = np.isin(at, marked)
    np.testing.assert_array_equal(row, want[:, None] | want)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize(("length", "block"), [(64, 4), (61, 4), (9, 4), (3, 4)])
def test_random_blocks_are_different_and_none_is_near_or_an_end(length, block, number, causal):
  blocks, heads = -(-length // block), 5
  draw = lambda key: (
    RandomBlocks.draw(key, length, block=block, number=number, heads=heads, causal=causal).table
  )
  table = np.asarray(draw(jax.random.key(3)))
  assert table.shape == (1, heads, blocks, number)
  for head in range(heads):
    for own, chosen in enumerate(table[0, head].tolist()):
      end = own - 1 if causal else blocks - 1
      allowed = {b for b in range(1, min(end, blocks - 1)) if abs(b - own) > 1}
      found = [b for b in chosen if b >= 0]
      assert len(set(found)) == len(found) == min(number, len(allowed))
      assert set(found) <= allowed
  assert number == 0 or blocks < 9 or (table != np.asarray(draw(jax.random.key(4)))).any()


def test_every_random_block_is_as_likely_as_another():
  table = RandomBlocks.draw(jax.random.key(0), 96, block=8, number=3, heads=4000).table
  counts = np.bincount(np.asarray(table[0, :, 5]).ravel(), minlength=12)
  allowed = [1, 2, 3, 7, 8, 9, 10]
  assert counts.sum() == counts[allowed].sum() == 12000
  # Each is a binomial of 4000 trials at 3/7: five standard deviations are 157.
  np.testing.assert_allclose(counts[allowed], 12000 / 7, atol=157)


@pytest.mark.parametrize("block", [2, 4, 8])
@pytest.mark.parametrize(("length", "size"), [(48, 4), (45, 4), (64, 8)])
def test_tile_map_of_bigbird(length, size, block):
  mask = bigbird(jax.random.key(1), length, block=size, number=2, heads=2)
  mask = jax.tree.map(np.asarray, mask)
  seen = np.asarray(mask.dense(length))
  for head in range(2):
    blocks = mask.blocks(length, length, block, block, head=head)
    want = statuses(seen[0, head], block, block)
    np.testing.assert_array_equal(blocks.dense() > 0, want > 0)
    for got in (blocks.dense(), by_columns(blocks)):
      assert ((got == want) | (got == 1)).all()


def test_a_mask_for_each_head():
  masks = (SlidingWindow(2, 0), Causal() & Global((3,)))
  mask = PerHead(masks, (1, 0, 1))
  dense = mask.dense(12)
  for head, inner in enumerate(mask.index):
    np.testing.assert_array_equal(dense[0, head], masks[inner].dense(12))
    np.testing.assert_array_equal(
      mask.blocks(12, 12, 4, 4, head=head).dense(), masks[inner].blocks(12, 12, 4, 4).dense()
    )
  assert mask.mean_keys(12) == pytest.approx(float(dense.mean()) * 12)


def test_longformer_is_its_parts():
  got = longformer(2, (0, 7), dilation=(1, 3), causal=True).dense(16)
  for head, local in enumerate((SlidingWindow(2, 2), Dilated(2, 3))):
    np.testing.assert_array_equal(got[0, head], ((local | Global((0, 7))) & Causal()).dense(16))
  np.testing.assert_array_equal(longformer(3).dense(9), SlidingWindow(3, 3).dense(9))


def bigbird_tiles(table, tiles: int, blocks: int) -> int:
  """Tiles of `blocks` blocks with work: rows and columns of the ends, neighbours, random ones."""
  visited = set()
  for i in range(tiles):
    own = range(i * blocks, (i + 1) * blocks)
    seen = {b + d for b in own for d in (-1, 0, 1)} | set(
      table[0, 0, own.start : own.stop].ravel().tolist()
    )
    visited |= {(i, b // blocks) for b in seen if 0 <= b < tiles * blocks}
    visited |= {(i, 0), (i, tiles - 1), (0, i), (tiles - 1, i)}
  return len(visited)


@pytest.mark.parametrize(
  ("name", "visited"),
  [
    # 2048 × 2048 tiles of 512: the triangle; 9 a row less what the start lacks; a window of 512 on
    # both sides and the first tile of queries and keys; 8 blocks of 64 a tile.
    ("causal", 2048 * 2049 // 2),
    ("window", 9 * 2048 - 36),
    ("longformer", 3 * 2048 - 2 + 2 * (2048 - 2)),
    ("bigbird", None),
  ],
)
def test_a_million_positions_need_no_square(name, visited):
  length = 2**20
  mask = {
    "causal": lambda: Causal(),
    "window": lambda: Causal() & SlidingWindow(4096, 0),
    "longformer": lambda: longformer(512, 16),
    "bigbird": lambda: bigbird(jax.random.key(0), length, block=64),
  }[name]()
  tracemalloc.start()
  start = time.perf_counter()
  blocks = mask.blocks(length, length, 512, 512)
  taken, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
  tracemalloc.stop()
  print(name, taken, peak)
  assert peak < 200e6
  if visited is None:
    visited = bigbird_tiles(np.asarray(mask.second.table), length // 512, 8)
  assert blocks.rows.visited == blocks.columns.visited == visited


def test_plot_draws_pairs_and_tiles(tmp_path):
  figure = longformer(2, 1).plot(16, block_q=4, block_k=4)
  (axes,) = figure.axes
  assert axes.get_title() == "88% of the tiles visited"
  assert len(axes.patches) == 14
  figure.savefig(tmp_path / "mask.png")


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: SlidingWindow(-1, 0), "left=-1"),
    (lambda: Dilated(1, 0), "dilation=0"),
    (lambda: BlockWindow(1, 1, 0), "block=0"),
    (lambda: Global((0, -2)), "positions=-2"),
    (lambda: Global(jnp.zeros((2,))), "an array .batch, number"),
    (lambda: Global((4,)).blocks(4, 4, 2, 2), "position 4; allowed: 0 … 3"),
    (lambda: Prefix(5).blocks(4, 4, 2, 2), "Prefix of 5; allowed: 0 … 4"),
    (lambda: PerHead((Full(),), (0, 1)), r"index=\(0, 1\)"),
    (lambda: (PerHead((Full(),), (0,) * 2) & PerHead((Full(),), (0,) * 3)).heads, "2 and of 3"),
    (lambda: Causal().blocks(4, 4, 0, 4), "block_q=0"),
    (lambda: Causal().blocks(4, 4, 2, 2, head=1), "head=1"),
    (lambda: RandomBlocks(jnp.zeros((1, 1, 3, 1), int), 2).blocks(4, 4, 2, 2), "RandomBlocks"),
    (lambda: Documents(jnp.zeros((1, 3), int)).blocks(4, 4, 2, 2), r"\(1, 3\).*expected \(1, 4\)"),
    (lambda: Predicate(max, visited=Documents(jnp.zeros((1, 4), int))), "visited"),
  ],
)
def test_bad_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
