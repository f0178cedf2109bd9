"""Attention in tiles against the same thing written out in float64, values and all gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.attention.masks import (
  BlockWindow,
  Causal,
  Dilated,
  Documents,
  Full,
  Global,
  Predicate,
  Prefix,
  RandomBlocks,
  SlidingWindow,
  longformer,
)
from effjax.kernels.flash_attention import cases, reference
from effjax.kernels.flash_attention.tiled import steps, xla
from effjax.kernels.flash_attention.tiled.tiles import Tiles

SMALL = Tiles(1, 1, 16, 16)


def check_against_float64(arrays, tolerance, where, tiles=SMALL, **options):
  """Values and gradients, of masks and ids known when tracing; returns them."""
  run = functools.partial(xla.attention, tiles=tiles, **where, **options)
  got = jax.jit(functools.partial(cases.evaluate, run))(arrays, {})
  for x, y in zip(got, cases.exact(**options)(arrays, where), strict=True):
    x = np.asarray(x, np.float64)
    np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y))
    x, y = (np.where(np.isfinite(y), z, 0) for z in (x, y))
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1))
  return got


def random_blocks(heads: int):
  return RandomBlocks.draw(jax.random.key(5), 45, block=4, number=2, heads=heads)


@pytest.mark.parametrize(
  "mask",
  [
    pytest.param(longformer(2, (0, 33), dilation=(1, 3) * 2, causal=True), id="longformer"),
    pytest.param(random_blocks(4) | BlockWindow(1, 1, 4), id="bigbird"),
    pytest.param(~random_blocks(1) & Causal(), id="not"),
    pytest.param(Global(jnp.array([[3, 44], [-1, 20]])) & ~Dilated(5, 2), id="global"),
    pytest.param(Causal() | Prefix(jnp.array([7, 0])), id="prefix"),
    pytest.param(Predicate(lambda q, k: (q * k) % 3 == 1), id="predicate"),
  ],
)
@pytest.mark.parametrize("tiles", [Tiles(2, 1, 16, 8), Tiles(1, 2, 8, 16, fixed=True)])
def test_patterns(mask, tiles):
  """Of heads, of the batch and of data, where tiles hold several heads and rows, and T < S."""
  arrays = cases.operands(2, 37, 45, 4, 2, 4, 6)
  check_against_float64(arrays, 2e-6, {"mask": mask}, tiles, scale=0.4)


@st.composite
def small_cases(draw):
  B, K, G = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
  T, S = draw(st.integers(1, 50)), draw(st.integers(1, 50))
  width = st.one_of(st.none(), st.integers(0, 40))
  band = st.one_of(st.just(Causal()), st.just(Full()), st.builds(SlidingWindow, width, width))
  mask = draw(st.one_of(band, st.builds(lambda a, b: a & ~b, band, band), st.builds(Full)))
  shape = (B, K * G, T, S)
  bias = draw(st.one_of(st.none(), st.tuples(*(st.sampled_from((1, n)) for n in shape))))
  cap = draw(st.sampled_from((None, 1.5)))
  tiles = Tiles(
    draw(st.sampled_from((1, B))), draw(st.sampled_from((1, K))), 16, 8, draw(st.booleans())
  )
  return cases.operands(B, T, S, K * G, K, 4, 6, bias, rng=T), mask, cap, tiles


@settings(max_examples=4, deadline=None)
@given(small_cases())
def test_random_problems(case):
  arrays, mask, cap, tiles = case
  check_against_float64(arrays, 2e-6, {"mask": mask}, tiles, scale=0.4, logit_softcap=cap)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(small_cases())
def test_many_random_problems(case):
  arrays, mask, cap, tiles = case
  check_against_float64(arrays, 2e-6, {"mask": mask}, tiles, scale=0.4, logit_softcap=cap)


@pytest.mark.parametrize("batch", [1, 2])
def test_segments_and_padding(batch):
  ids = jnp.array([[0] * 20 + [1] * 13 + [-1] * 7, [-1] * 5 + [3] * 30 + [-1] * 5])
  arrays = cases.operands(2, 40, 40, 4, 2, 8, 8)
  tiles = Tiles(batch, 1, 16, 8)
  for where in ({"mask": Causal(), "segment_ids": (ids, ids)}, {"mask": Causal() & Documents(ids)}):
    check_against_float64(arrays, 2e-6, where, tiles, scale=0.3)


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(3, 3) | Global((2, 30))])
def test_query_positions(mask):
  positions = jnp.array([[3, 9, 2, 30], [0, 1, 2, 3]])
  where = {"mask": mask, "query_positions": positions}
  check_against_float64(cases.operands(2, 4, 40, 2, 1, 8, 8), 2e-6, where, scale=1.0)


def test_rows_that_see_nothing_are_zero_with_zero_gradients():
  arrays = cases.operands(1, 20, 20, 2, 1, 8, 8, bias=(1, 1, 20, 20))
  ids = jnp.where(jnp.arange(20) < 12, 0, -1)[None]
  run = functools.partial(
    xla.attention, mask=Full(), scale=1.0, segment_ids=(ids, ids), tiles=SMALL
  )
  results = jax.jit(functools.partial(cases.evaluate, run))(arrays, {})
  out, lse, d_q, d_k, d_v, d_b = map(np.asarray, results)
  assert (lse[:, 12:] == -np.inf).all() and np.isfinite(lse[:, :12]).all()
  for x in (out, d_q, d_k, d_v, d_b[0]):
    assert (x[:, 12:] == 0).all() and np.abs(x[:, :12]).sum() > 0


def test_bias_of_minus_infinity_hides_like_a_mask():
  q, k, v, *_ = cases.operands(1, 24, 24, 2, 2, 8, 8)
  bias = jnp.where(Causal().dense(24), 0.0, -jnp.inf)[None, None]
  run = functools.partial(xla.attention, scale=1.0, tiles=SMALL)
  hidden = jax.jit(functools.partial(run, mask=Full()))(q, k, v, bias=bias)
  masked = jax.jit(functools.partial(run, mask=Causal()))(q, k, v)
  chex.assert_trees_all_close(hidden, masked, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 1e-2), ("float16", 2e-3)])
def test_half_precision(dtype, tolerance):
  arrays = cases.operands(1, 40, 40, 4, 2, 16, 16, dtype=dtype)
  out, *_ = check_against_float64(arrays, tolerance, {"mask": Causal()}, scale=0.25)
  assert out.dtype == dtype


@functools.partial(jax.jit, static_argnames=("mask", "fixed"))
def with_a_maximum(q, k, v, mask, fixed):
  tiles = Tiles(1, 2, 16, 16, fixed)
  return xla.attention(q, k, v, mask=mask, scale=1.0, tiles=tiles)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("mask", [Causal(), ~Causal(), SlidingWindow(20, 20)])
@pytest.mark.parametrize("steps", [(0, 300, -300, 0), (200, 0, 0, 100), (-1e4, 40, 0, 1e4)])
def test_a_fixed_maximum_gives_way_where_scores_lie_far_from_it(mask, steps):
  """Tiles of keys, hidden ones among them, whose scores are off each other's by these steps."""
  q, k, v, *_ = cases.operands(1, 64, 64, 2, 2, 8, 8)
  q = q.at[..., 0].set(1.0)
  k = k.at[..., 0].set(jnp.repeat(jnp.asarray(steps, jnp.float32), 16)[None, :, None])
  fixed, running = (with_a_maximum(q, k, v, mask, fixed) for fixed in (True, False))
  chex.assert_trees_all_close(fixed, running, atol=1e-5)


def test_exponential():
  x = np.linspace(-87, 87, 100_001, dtype=np.float32)
  found, expected = np.asarray(jax.jit(steps.exp)(x), np.float64), np.exp(x.astype(np.float64))
  np.testing.assert_allclose(found, expected, rtol=5e-6)
  small = np.abs(x) < 1
  np.testing.assert_allclose(found[small], expected[small], rtol=3e-7)
  ends = jax.jit(steps.exp)(jnp.asarray([-jnp.inf, -1e30, -90.0, 0.0, jnp.nan]))
  np.testing.assert_array_equal(ends, [0, 0, 0, 1, np.nan])


@pytest.mark.parametrize("fixed", [False, True])
def test_transformations_agree(fixed, request):
  if fixed:  # the bound is close to what another rounding of the scores makes
    request.getfixturevalue("optimized")
  arrays = cases.operands(2, 40, 40, 4, 2, 8, 8)[:3]
  ids = jnp.sort(jax.random.randint(jax.random.key(1), (2, 40), -1, 3), 1)

  tiles = Tiles(1, 1, 16, 16, fixed)

  def attention(q, k, v, ids):
    return xla.attention(q, k, v, mask=Causal(), scale=1.0, segment_ids=(ids, ids), tiles=tiles)[0]

  def mapped(*x):
    return jax.vmap(lambda *x: attention(*(y[None] for y in x))[0])(*x)

  mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=(AxisType.Auto,) * 2)
  spec = P("b", None, "h")
  sharded = jax.shard_map(attention, mesh=mesh, in_specs=(spec, spec, spec, P("b")), out_specs=spec)

  def both(function):
    """Gradients and tangents."""
    run = lambda *x: function(*x, ids)
    gradients = jax.grad(lambda *x: (run(*x) ** 2).sum(), (0, 1, 2))
    return jax.jit(lambda *x: (gradients(*x), jax.jvp(run, x, x)[1]))(*arrays)

  want = both(attention)
  for function in (jax.checkpoint(attention), mapped, sharded):
    chex.assert_trees_all_close(both(function), want, atol=1e-5)


@pytest.mark.usefixtures("optimized")
def test_sharded_arguments_are_not_gathered():
  mesh = jax.make_mesh((4, 2), ("b", "h"), axis_types=(AxisType.Auto,) * 2)
  x = jax.device_put(jnp.ones((4, 64, 2, 8)), NamedSharding(mesh, P("b", None, "h")))
  loss = lambda q, k, v: xla.attention(q, k, v, mask=Causal(), scale=1.0)[0].sum()
  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
  assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_tangents(dtype, tolerance):
  """Forward-mode against float64, with all that scores go through and rows that see nothing."""
  ids = jnp.where(jnp.arange(24) < 17, 0, -1)[None]
  options = {"mask": Causal(), "scale": 0.4, "logit_softcap": 1.5, "segment_ids": (ids, ids)}
  at, to = (
    cases.operands(2, 24, 24, 4, 2, 4, 6, (1, 4, 24, 24), dtype, seed)[:4] for seed in (0, 1)
  )

  def tangents(attention, *arrays):
    run = lambda q, k, v, b: attention(q, k, v, bias=b, **options)
    return jax.jvp(run, *map(tuple, arrays))[1]

  tiled = functools.partial(xla.attention, tiles=Tiles(2, 1, 16, 8))
  got = jax.jit(functools.partial(tangents, tiled))(at, to)
  with jax.enable_x64(True):
    wide = [[jax.device_put(np.asarray(x, np.float64)) for x in arrays] for arrays in (at, to)]
    want = jax.jit(functools.partial(tangents, reference.attention))(*wide)
  assert [x.dtype for x in got] == [dtype, jnp.float32]
  for x, y in zip(got, map(np.asarray, want), strict=True):
    scale = max(np.abs(y).max(), 1)
    np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=0, atol=tolerance * scale)
    assert (np.asarray(x)[:, 17:] == 0).all()


def test_second_derivatives_or_a_clear_error():
  q, k, v, *_ = cases.operands(1, 20, 20, 1, 1, 4, 4)
  forward = lambda attention: lambda q: attention(q, k, v, mask=Causal(), scale=1.0)[0]
  gradient = lambda attention: jax.grad(lambda q: (forward(attention)(q) ** 2).sum())
  move = lambda f, q: jax.jvp(f, (q,), (v,))[1]

  def stopped(attention):
    """As consistency models and MeanFlow (arXiv 2505.13447) have it."""
    target = lambda q: jax.lax.stop_gradient(move(forward(attention), q))
    return jax.grad(lambda q: ((forward(attention)(q) - target(q)) ** 2).sum())

  forms = {
    "forward over reverse": lambda attention, q: move(gradient(attention), q),
    "forward over forward": lambda attention, q: move(lambda q: move(forward(attention), q), q),
    "reverse past a tangent": lambda attention, q: stopped(attention)(q),
  }
  every = lambda attention: jax.jit(lambda q: {n: f(attention, q) for n, f in forms.items()})(q)
  chex.assert_trees_all_close(every(xla.attention), every(reference.attention), atol=1e-4)
  for again in (gradient(xla.attention), lambda q: move(forward(xla.attention), q)):
    with pytest.raises(ValueError, match="Reverse-mode"):
      jax.eval_shape(jax.grad(lambda q, again=again: again(q).sum()), q)


def temporaries(length: int, mask) -> int:
  x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
  loss = lambda q, k, v: xla.attention(q, k, v, mask=mask, scale=1.0, tiles=Tiles(1, 2, 128, 128))[
    0
  ].sum()
  compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(x, x, x).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("optimized")
def test_memory_is_linear():
  sizes = [temporaries(length, Causal()) for length in (2048, 4096, 8192)]
  assert sizes[2] - sizes[1] <= 2.2 * (sizes[1] - sizes[0])
  assert sizes[2] < 8192**2


def test_work_follows_the_visited_tiles():
  """A window's steps, counted through the predicate's callbacks, are those of its tile map."""
  visited = []

  class Counted(SlidingWindow):
    def predicate(self, q, k, *features):
      see = lambda q, k: visited.append((int(q), int(k)))
      jax.debug.callback(see, q[0, 0, 0, 0, 0], k[0, 0, 0, 0, 0])
      return super().predicate(q, k, *features)

  jax.tree_util.register_static(Counted)
  mask = Counted(40, 0)
  q, k, v, *_ = cases.operands(1, 256, 256, 1, 1, 4, 4)
  jax.jit(lambda q: xla.attention(q, k, v, mask=mask, scale=1.0, tiles=SMALL))(q)
  jax.effects_barrier()
  status = SlidingWindow(40, 0).blocks(256, 256, 16, 16).dense()
  partial = {(16 * i, 16 * j) for i, j in zip(*np.nonzero(status == 1), strict=True)}
  assert set(visited) == partial and len(visited) == len(partial)
