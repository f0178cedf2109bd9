"""Sets of tiles as intervals, against Python's sets."""

import jax
import numpy as np
import pytest

from effjax.kernels.flash_attention.tile_map.spans import Grid, Spans, union

TILES = 12


def algebra(start, stop):
  """The operations on the two halves of the rows of overlapping intervals."""
  a, b = (union(start[:, :, rows], stop[:, :, rows]) for rows in np.s_[:50, 50:])
  sets = {"a": a, "b": b, "and": a & b, "or": a | b, "not": a.complement(TILES)}
  return {name: (each.start, each.stop, each.count()) for name, each in sets.items()}


def tiles(start, stop) -> list[set[int]]:
  """The tiles of each row."""
  rows = zip(start.reshape(-1, start.shape[-1]), stop.reshape(-1, stop.shape[-1]), strict=True)
  return [{t for low, high in zip(*row, strict=True) for t in range(low, high)} for row in rows]


@pytest.mark.parametrize("run", [algebra, jax.jit(algebra)], ids=["known", "traced"])
def test_operations_are_those_of_sets(run):
  start, stop = np.random.default_rng(0).integers(0, TILES + 1, (2, 1, 1, 100, 3), np.int32)
  found = {name: [np.asarray(x) for x in each] for name, each in run(start, stop).items()}
  whole = tiles(start, stop)
  a, b = whole[:50], whole[50:]
  want = {
    "a": a,
    "b": b,
    "and": [x & y for x, y in zip(a, b, strict=True)],
    "or": [x | y for x, y in zip(a, b, strict=True)],
    "not": [set(range(TILES)) - x for x in a],
  }
  for name, (start, stop, count) in found.items():
    assert tiles(start, stop) == want[name], name
    assert count.ravel().tolist() == [len(x) for x in want[name]], name


def test_intervals_are_disjoint_ascending_and_the_empty_ones_last():
  start, stop = np.random.default_rng(1).integers(0, TILES + 1, (2, 1, 1, 100, 4), np.int32)
  spans = union(start, stop)
  some = spans.start < spans.stop
  assert (some[..., :-1] | ~some[..., 1:]).all()
  assert ((spans.stop[..., :-1] <= spans.start[..., 1:]) | ~some[..., 1:]).all()


def test_tiles_that_touch_an_interval_of_keys_and_tiles_inside_it():
  length, block = 22, 4  # the last tile is short
  grid = Grid.of(1, length, 1, block)
  low, high = np.random.default_rng(2).integers(-5, length + 5, (2, 1, 1, 200))
  keys = [set(range(t * block, min((t + 1) * block, length))) for t in range(grid.tiles)]
  shown = [set(range(*ends)) for ends in zip(low.ravel(), high.ravel() + 1, strict=True)]
  touching, inside = grid.touching(low, high), grid.inside(low, high)
  some = [{t for t, ks in enumerate(keys) if ks & row} for row in shown]
  every = [{t for t, ks in enumerate(keys) if ks <= row} for row in shown]
  assert tiles(touching.start, touching.stop) == some
  assert tiles(inside.start, inside.stop) == every


def test_an_empty_set_has_no_tiles():
  empty = Spans(np.full((1, 1, 2, 1), 3), np.full((1, 1, 2, 1), 3))
  assert empty.count().tolist() == [[[0, 0]]]
  assert tiles(empty.complement(4).start, empty.complement(4).stop) == [{0, 1, 2, 3}] * 2
