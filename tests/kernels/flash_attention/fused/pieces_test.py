"""Long lists are worked on in pieces, which leave no tile out and give what the whole would."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention.masks import Causal, Full, Global, Mask, SlidingWindow, bigbird, longformer
from effjax.kernels.flash_attention import cases
from effjax.kernels.flash_attention.fused import gpu, pieces
from effjax.kernels.flash_attention.fused.pieces import Pieces
from effjax.kernels.flash_attention.fused.sizes import Size, Sizes
from effjax.kernels.flash_attention.tile_map.blocks import TileList, tile_lists
from effjax.kernels.flash_attention.tile_map.sight import Sight, Where

LENGTH = 100
SIZES = Sizes(*[Size(16, 16)] * 3)
HIDDEN = 59  # a position that nothing sees and that sees nothing


def listed(lengths, xp=np, seed=0):
  """Lists of these lengths of random tiles, the first half of each full ones."""
  offset = np.pad(np.cumsum(lengths, -1), ((0, 0), (0, 0), (1, 0)))
  index = np.random.default_rng(seed).integers(0, 99, (*offset.shape[:2], offset.max() + 1))
  return TileList(*map(xp.asarray, (offset, offset[..., :-1] + lengths // 2, index)))


def in_threes(lengths, programs):
  return -(-lengths // 3)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("least", [0, 5])
def test_every_tile_is_in_one_piece_and_every_part_in_one_slot(group, least, monkeypatch):
  lengths = np.random.default_rng(least).integers(least, 12, (2, 4, 6))
  lengths[0, :2] = 1  # heads without a cut beside heads with many
  lists = listed(lengths)
  monkeypatch.setattr(pieces, "_long", in_threes)
  cut = Pieces.of(lists, 8, group)
  for b, h in np.ndindex(2, 4):
    offset, partial = cut.lists.offset[b, h], cut.lists.partial[b, h]
    assert (offset[:-1] <= partial).all() and (partial <= offset[1:]).all()
    assert offset[0] == 0 and offset[-1] == lengths[b, h].sum()
    row, slot = cut.row[b, h], cut.slot[b, h]
    joined, ends = (x[b, h // group] for x in (cut.joined, cut.ends))
    assert sorted(cut.order[b, h]) == list(range(cut.count))
    for r in range(6):
      mine = np.flatnonzero((row == r) & (slot < cut.ends.max()))
      inside = np.concatenate([np.arange(offset[n], offset[n + 1]) for n in mine])
      begin, end = lists.offset[b, h, r : r + 2]
      assert inside.tolist() == list(range(begin, end))
      full = sum(partial[n] - offset[n] for n in mine)
      assert full == lists.partial[b, h, r] - begin
      at = np.flatnonzero((joined == r) & (np.diff(ends) > 0))
      if len(mine) == 1:
        assert slot[mine[0]] == -1 and not len(at)
      else:
        assert slot[mine].tolist() == list(range(ends[at[0]], ends[at[0] + 1]))


def test_lists_known_to_the_device_alone_are_cut_into_as_many_pieces_as_asked_for():
  lengths = np.array([[[5, 0, 3]]])
  assert Pieces.of(listed(lengths, jnp), 1).row is None
  cut = jax.jit(lambda lists: Pieces.of(lists, 1, splits=2).lists)(listed(lengths))
  np.testing.assert_array_equal(cut.offset, [[[0, 2, 5, 5, 5, 6, 8]]])
  np.testing.assert_array_equal(cut.partial, [[[2, 2, 5, 5, 6, 6]]])


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("tiles", [(64, 128), (128, 128), (128, 64)])
def test_masks_are_cut_where_a_list_is_longer_than_most(tiles, by_columns):
  def slots(mask: Mask, length=4096):
    sight = Sight.of(Where(mask, None, None), length, length, *tiles)
    rows, columns = (length // size for size in tiles)
    return Pieces.of(tile_lists(sight, rows, columns, by_columns=by_columns), 8).slots

  for mask in Full(), Causal(), SlidingWindow(1023, 0), SlidingWindow(100, 100):
    assert not slots(mask)
  for mask in longformer(256, 2), longformer(256, (0, 4000)):
    assert 0 < slots(mask) < 32


# The heads of BigBird differ; a dilation of three takes heads whose lists have other lengths.
MASKS = {
  "longformer": longformer(8, 2),
  "dilated": longformer(4, (0, 33), dilation=(1, 1, 3, 3), causal=True),
  "bigbird": bigbird(jax.random.key(0), LENGTH, block=16, number=1, heads=4),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("keys", [2, 4])
def test_values_and_gradients_of_pieces(mask, keys, monkeypatch):
  """Of key and value heads that queries share or not; where NaN is hidden it stays there."""
  monkeypatch.setattr(pieces, "_long", in_threes)
  where = {"mask": jax.tree.map(np.asarray, MASKS[mask]) & ~Global((HIDDEN,))}
  arrays = cases.operands(2, LENGTH, LENGTH, 4, keys, 8, 16)
  arrays[1:3] = (x.at[:, HIDDEN].set(jnp.nan) for x in arrays[1:3])
  run = functools.partial(gpu.attention, sizes=SIZES, interpret=True, scale=0.4)
  program = jax.jit(lambda arrays: cases.evaluate(run, arrays, where)).trace(arrays)
  assert str(program.jaxpr).count("name=joined") == 3
  got = program.lower().compile()(arrays)
  for name, error in cases.errors(got, cases.exact(scale=0.4)(arrays, where)).items():
    assert error < 2e-6, name


def test_pieces_of_mapped_rows(monkeypatch):
  monkeypatch.setattr(pieces, "_long", in_threes)
  q, k, v, *_ = cases.operands(2, 64, 64, 2, 1, 8, 8)
  options = {"mask": longformer(4, 2), "sizes": SIZES, "interpret": True, "scale": 0.4}
  run = jax.jit(lambda *x: gpu.attention(*x, **options)[0])
  mapped = jax.jit(jax.vmap(lambda *x: run(*(y[None] for y in x))[0]))
  chex.assert_trees_all_close(mapped(q, k, v), run(q, k, v), atol=1e-6)
