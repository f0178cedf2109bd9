"""Every piece has one program, and the longest lists come first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.kernels.flash_attention.fused import pieces, programs
from effjax.kernels.flash_attention.fused.jobs import Job
from effjax.kernels.flash_attention.fused.sizes import Size
from effjax.kernels.flash_attention.tile_map.blocks import TileList


def lists(lengths, xp=np):
  offset = np.pad(np.cumsum(lengths, -1), ((0, 0), (0, 0), (1, 0)))
  return TileList(xp.asarray(offset), None, None)


def job(B, T, S, K, G, width=64):
  """The shapes of one, which are all that is asked for."""
  like = lambda length, heads: jax.ShapeDtypeStruct((B, length, heads, width), jnp.bfloat16)
  given = {"query": like(T, K * G), "key": like(S, K), "value": like(S, K), "size": Size(128, 128)}
  made = object.__new__(Job)
  for name, value in given.items():
    object.__setattr__(made, name, value)
  return made


@pytest.mark.parametrize("length", [1024, 2**19])  # heads that the cache holds together, or not
def test_each_piece_has_one_program(length):
  B, K, G = 2, 3, 2
  given = job(B, 1024, length, K, G)
  by_rows = programs.by_rows(given, 16)
  ids = np.indices(by_rows.grid).reshape(4, -1)
  at = lambda kind: np.asarray(jax.vmap(by_rows.axes[kind][1])(*ids))
  seen = set(zip(at("b"), at("n"), ids[programs.PIECES], strict=True))
  assert len(seen) == ids.shape[1] == B * K * G * 16
  assert (at("m") == at("n") // G).all()
  given = job(B, length, 1024, K, G)
  by_columns = programs.by_columns(given, 8)
  ids = np.indices(by_columns.grid).reshape(3, -1)
  at = lambda kind: np.asarray(jax.vmap(by_columns.axes[kind][1])(*ids))
  assert len(set(zip(at("b"), at("m"), ids[programs.PIECES], strict=True))) == B * K * 8
  assert by_columns.grid[0] == (B * K if length == 1024 else 1)


def test_the_longest_lists_come_first():
  lengths = np.random.default_rng(0).integers(0, 9, (2, 4, 7))
  order = pieces.longest_first(pieces.lengths_of(lists(lengths)))
  found = np.take_along_axis(lengths, order, -1)
  assert (np.diff(found) <= 0).all()
  traced = jax.jit(lambda: pieces.longest_first(pieces.lengths_of(lists(lengths, jnp))))()
  np.testing.assert_array_equal(order, traced)


def test_lists_of_heads_that_one_program_takes_count_together():
  lengths = np.array([[[1, 5, 2], [4, 0, 9]]])
  assert pieces.longest_first(pieces.lengths_of(lists(lengths), group=2)).tolist() == [
    [[2, 0, 1]] * 2
  ]


def test_lists_of_one_length_have_no_order():
  assert pieces.longest_first(np.full((1, 1, 5), 3)) is None
  assert pieces.longest_first(np.array([[[3]]])) is None
