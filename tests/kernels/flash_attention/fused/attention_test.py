"""The fused kernels, interpreted, against the same thing written out in float64."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from effjax.attention.masks import (
  Causal,
  Documents,
  Full,
  Global,
  RandomBlocks,
  SlidingWindow,
  bigbird,
  longformer,
)
from effjax.kernels.flash_attention import cases
from effjax.kernels.flash_attention.fused import gpu, jobs, tpu
from effjax.kernels.flash_attention.fused.sizes import Size, Sizes, choose
from effjax.kernels.flash_attention.tile_map.blocks import tile_lists
from effjax.kernels.flash_attention.tile_map.partly import Partly
from effjax.kernels.flash_attention.tile_map.sight import Sight, Where

PLATFORMS = pytest.mark.parametrize("platform", [gpu, tpu], ids=["gpu", "tpu"])
SMALL = Sizes(Size(32, 32, part=16), Size(32, 16), Size(16, 32, part=16))
MASKS = {
  "causal": Causal(),
  "longformer": longformer(2, (0, 33), dilation=(1, 3) * 2, causal=True),
  "global": Global(jnp.array([[3, 44], [-1, 20]])) | SlidingWindow(4, 0),
}


def problem(B=2, T=37, S=45, N=4, K=2, H=8, Hv=16, bias=None):
  return cases.operands(B, T, S, N, K, H, Hv, bias)


def check(platform, arrays, where, **options):
  """Values and all gradients to 2e-6."""
  run = functools.partial(platform.attention, sizes=SMALL, interpret=True, **options)
  got = jax.jit(functools.partial(cases.evaluate, run))(arrays, where)
  options.pop("splits", None)
  want = cases.exact(**options)(arrays, where)
  for name, error in cases.errors(got, want).items():
    assert error < 2e-6, name


@PLATFORMS
@pytest.mark.parametrize("mask", MASKS)
def test_values_and_gradients(platform, mask):
  """Of heads and of data; widths and lengths no multiple of a tile's; bias and soft cap."""
  arrays = problem(bias=(1, 4, 37, 45) if mask == "causal" else None)
  softcap = 1.5 if mask == "causal" else None
  check(platform, arrays, {"mask": MASKS[mask]}, scale=0.4, logit_softcap=softcap)


@PLATFORMS
def test_bias_shared_by_batch_heads_and_queries(platform):
  ids = jnp.array([[0] * 20 + [1] * 13 + [-1] * 7, [-1] * 5 + [3] * 30 + [-1] * 5])
  where = {"mask": Full(), "segment_ids": (ids, ids)}
  check(platform, problem(T=40, S=40, bias=(2, 1, 1, 40)), where, scale=0.3)


@pytest.mark.parametrize("splits", [1, 3])
def test_decoding_folds_heads_and_joins_parts_of_the_keys(splits):
  positions = jnp.array([[3, 9, 30], [0, 44, 2]])
  where = {"mask": Causal() & SlidingWindow(25, 0), "query_positions": positions}
  check(gpu, problem(T=3), where, scale=0.4, splits=splits)


@pytest.mark.parametrize(("heads", "splits"), [(4, 1), (2, 3)])
def test_one_token_against_a_ragged_cache_with_empty_slots(heads, splits):
  arrays = problem(T=1, N=heads)
  written = np.random.default_rng(0).random((2, 45)) < 0.6
  arrays[1:3] = (jnp.where(written[..., None, None], x, jnp.nan) for x in arrays[1:3])
  ids = jnp.zeros((2, 1), jnp.int32), jnp.asarray(written, jnp.int32) - 1
  where = {"mask": Causal(), "query_positions": jnp.array([[44], [17]]), "segment_ids": ids}
  check(gpu, arrays, where, scale=0.4, splits=splits)


def test_blocks_drawn_before_tracing_are_constants():
  """And masks that are equal share the lists that were built once."""
  mask = RandomBlocks.draw(jax.random.key(0), 64, block=8, number=2)
  q, k, v, *_ = problem(T=64, S=64)
  data = []

  @jax.jit
  def run(q, k, v):
    data.append(Partly.of(Where(mask, None, None)))
    return gpu.attention(q, k, v, mask=mask, scale=0.4, sizes=SMALL, interpret=True)[0]

  run(q, k, v)
  assert not data[0].data and isinstance(data[0].tree.mask.table, np.ndarray)
  assert data[0] == jax.tree.unflatten(*reversed(jax.tree.flatten(data[0])))
  assert hash(data[0]) == hash(dataclasses.replace(data[0]))
  assert len(Partly.of(Where(mask, None, None)).data) == 1  # nothing is being traced here
  before = jobs._fixed.cache_info().misses
  jax.jit(lambda *x: 2 * run.__wrapped__(*x))(q, k, v)
  assert jobs._fixed.cache_info().misses == before


def test_parts_of_the_keys_where_a_query_sees_nothing():
  ids = jnp.array([[-1] * 5 + [0] * 40] * 2)
  where = {"mask": Causal(), "segment_ids": (ids[:, :37], ids)}
  check(gpu, problem(), where, scale=0.4, splits=4)


@PLATFORMS
def test_a_mask_that_shows_nothing(platform):
  check(platform, problem(B=1, T=20, S=20), {"mask": ~Full()}, scale=0.4)


@pytest.mark.parametrize("shape", [(40, 40, 4, 2), (16, 60, 1, 1)], ids=["grouped", "one tile"])
def test_copies_to_and_fro_overlap_without_a_race(shape, capfd):
  """Copies made as late as their waits allow; programs that follow each other share a tile."""
  T, S, N, K = shape
  how = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait")
  sizes = Sizes(*[Size(16, 16)] * 3)
  arrays, where = problem(1, T, S, N, K), {"mask": Causal()}
  run = functools.partial(tpu.attention, sizes=sizes, interpret=how, scale=0.4)
  got = jax.jit(functools.partial(cases.evaluate, run))(arrays, where)
  errors = cases.errors(got, cases.exact(scale=0.4)(arrays, where))
  assert max(errors.values()) < 2e-6
  assert "race" not in capfd.readouterr().out.lower()


@PLATFORMS
def test_maps_over_rows_and_shards_over_batch_and_heads(platform):
  q, k, v, *_ = problem(T=40, S=40)
  run = lambda q, k, v: platform.attention(
    q, k, v, mask=Causal(), scale=0.4, sizes=SMALL, interpret=True
  )[0]
  gradients = lambda run: jax.jit(jax.grad(lambda *x: (run(*x) ** 2).sum(), (0, 1, 2)))(q, k, v)
  mapped = jax.vmap(lambda *x: run(*(y[None] for y in x))[0])
  mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  spec = P("b", None, "h")
  sharded = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  want = gradients(run)
  for function in (mapped, sharded):
    chex.assert_trees_all_close(gradients(function), want, atol=1e-5)


def listed(lists) -> list[tuple[set[int], set[int]]]:
  """Full and partial tiles of each row of batch row 0, head 0."""
  offset, partial, index = (np.asarray(x)[0, 0] for x in (lists.offset, lists.partial, lists.index))
  return [
    (set(index[a:b]), set(index[b:c]))
    for a, b, c in zip(offset[:-1], partial, offset[1:], strict=True)
  ]


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("mask", [Causal(), longformer(9, (0, 33)), SlidingWindow(0, 3)])
def test_lists_are_the_same_whether_known_when_tracing_or_not(mask, by_columns):
  def lists(positions):
    sight = Sight.of(Where(mask, None, positions), 37, 45, 8, 4)
    return tile_lists(sight, 5, 12, by_columns=by_columns)

  at = jnp.arange(8, 45, dtype=jnp.int32)[None]
  known, traced = lists(np.asarray(at)), jax.jit(lists)(at)
  assert isinstance(known.offset, np.ndarray)
  assert listed(known) == listed(traced)
  assert 0 < known.offset[0, 0, -1] < 60


@PLATFORMS
def test_what_the_kernels_cannot_take_is_named(platform):
  wide = jnp.ones((1, 16, 1, 300))
  with pytest.raises(ValueError, match="head width 300; fused kernels take up to 256"):
    platform.attention(wide, wide, wide, mask=Full(), scale=1.0, interpret=True)


def test_sizes_are_no_larger_than_the_call():
  large, small = choose("gpu", jnp.bfloat16, 64, 4096, 4096), choose("gpu", jnp.bfloat16, 64, 1, 40)
  assert large.forward.queries >= 64
  assert (small.forward.queries, small.forward.keys) == (16, 64)
  assert choose("tpu", jnp.float32, 256, 100, 100).forward.keys == 128
  tiny = choose("tpu", jnp.bfloat16, 256, 100, 300).forward
  assert (tiny.queries, tiny.keys, tiny.part) == (128, 512, 128)


def test_a_device_has_its_own_sizes():
  h200, other = (choose("gpu", jnp.bfloat16, 256, 999, 999, name) for name in ("NVIDIA H200", "L4"))
  assert h200.forward.queries > other.forward.queries
  v6e, v5e = (
    choose("tpu", "bfloat16", 128, 9999, 9999, f"TPU {name}") for name in ("v6 lite", "v5e")
  )
  assert v6e.forward.keys > v5e.forward.keys
  assert choose("gpu", jnp.float32, 64, 999, 999, "NVIDIA H200") == choose(
    "gpu", jnp.float32, 64, 999, 999
  )


def test_a_predicate_that_reads_much_has_smaller_tiles():
  of = lambda mask: choose("gpu", jnp.bfloat16, 128, 4096, 4096, "NVIDIA H100", mask).forward.keys
  few = Causal(), Documents(jnp.zeros((2, 4096), jnp.int32)), longformer(9, (0, 33))
  assert [of(mask) for mask in few] == [128] * 3
  assert of(bigbird(jax.random.key(0), 4096)) == 64
