"""Fused attention on TPUs, in Mosaic through Pallas.

The grid's last axis goes through the listed tiles of all rows (for dK and dV columns) one after the
other, so that the next tile's keys and values arrive while this one is worked on, whatever the mask
leaves out. What a row sums stays in VMEM from its first tile to its last.
"""

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effjax.core.typing import Array, Float
from effjax.kernels.flash_attention import row_bias
from effjax.kernels.flash_attention.fused import frame, interpreted, steps, walks
from effjax.kernels.flash_attention.fused.jobs import Job, Kernels
from effjax.kernels.flash_attention.fused.places import Place
from effjax.kernels.flash_attention.fused.sizes import Sizes
from effjax.kernels.flash_attention.tile_map.terms import Terms

_LANES = 128


def _forward(job: Job) -> tuple[Array, ...]:
  B, T, N, _ = job.query.shape
  Hv, rows = job.value.shape[-1], job.size.queries

  def kernel(step, x, out, top, log_sum, *state):
    @pl.when(step.first)
    def _():
      _put(state, steps.start(rows, Hv))

    def tile(how, *carry):
      logits, _, shown = step.scores(x, x.query[...], x.key[...], _read(x.bias), how)
      return steps.accumulate(carry, logits, x.value[...], shown, job.powers)

    step.visit(x, tile, state)

    @pl.when(step.last)
    def _():
      result, *sums = steps.finish(*(ref[...] for ref in state))
      out[...] = result.astype(out.dtype)
      _put((top, log_sum), map(_turned, sums))

  line = ("bn1q", (B, N, 1, T), jnp.float32)
  results = ("bnqh", (B, N, T, Hv), job.query.dtype), line, line
  scratch = [(rows, 1), (rows, 1), (rows, Hv)]
  out, *sums = _call(job, kernel, _by_rows(job), results, scratch)
  return jnp.swapaxes(out, 1, 2)[None], *(x[None, :, :, 0] for x in sums)


def _queries(job: Job) -> Array:
  B, T, N, H = job.query.shape
  rows = job.size.queries

  def kernel(step, x, d_query, total, *lines):
    @pl.when(step.first)
    def _():
      values = (_turned(ref[...]) for ref in (x.top, x.delta))
      _put((total, *lines), (jnp.zeros((rows, H), jnp.float32), *values))

    def tile(how, total):
      k = x.key[...]
      top, delta = (ref[...] for ref in lines)
      logits, slope, shown = step.scores(x, x.query[...], k, _read(x.bias), how)
      weights = job.powers(logits, top)
      d_weights = steps.dot(x.d_out[...], x.value[...], (1, 1))
      gradient = steps.score_gradient(weights, d_weights, delta, slope)
      return (total + shown.dot(gradient, k),)

    step.visit(x, tile, (total,))

    @pl.when(step.last)
    def _():
      share = jnp.exp2(-_turned(x.log_sum[...]))
      d_query[...] = (total[...] * (job.settings.scale * share)).astype(d_query.dtype)

  results = (("bnqh", (B, N, T, H), job.query.dtype),)
  (d_query,) = _call(job, kernel, _by_rows(job), results, [(rows, H)] + [(rows, 1)] * 2)
  return jnp.swapaxes(d_query, 1, 2)


def _keys(job: Job) -> tuple[Array, Array]:
  B, S, K, H = job.key.shape
  Hv, rows = job.value.shape[-1], job.size.keys

  def kernel(step, x, d_key, d_value, *sums):
    @pl.when(step.first)
    def _():
      _put(sums, (jnp.zeros((rows, width), jnp.float32) for width in (H, Hv)))

    def tile(how, d_k, d_v):
      q, d_out = x.query[...], x.d_out[...]
      bias = None if x.bias is None else x.bias[...].astype(jnp.float32).T
      logits, slope, shown = step.scores(x, x.key[...], q, bias, how)
      weights = steps.weights(logits, job.powers, x.top[...], x.log_sum[...])
      d_weights = steps.dot(x.value[...], d_out, (1, 1))
      gradient = steps.score_gradient(weights, d_weights, x.delta[...], slope)
      return d_k + shown.dot(gradient, q), d_v + shown.dot(weights, d_out)

    step.visit(x, tile, sums)

    @pl.when(step.last)
    def _():
      d_key[...] = (sums[0][...] * job.settings.scale).astype(d_key.dtype)
      d_value[...] = sums[1][...].astype(d_value.dtype)

  place = _by_columns(job)
  heads = place.grid[1]
  kinds = (job.key.dtype, job.value.dtype) if heads == K else (jnp.float32,) * 2
  results = ("bxkh", (B, heads, S, H), kinds[0]), ("bxkh", (B, heads, S, Hv), kinds[1])
  d_key, d_value = _call(job, kernel, place, results, [(rows, H), (rows, Hv)])
  like = lambda d, x: d.reshape(B, K, -1, *d.shape[2:]).sum(2).swapaxes(1, 2).astype(x.dtype)
  return like(d_key, job.key), like(d_value, job.value)


def _bias(job: Job) -> Array:
  """Sums over the batch rows and heads that the bias is shared by; visits every tile."""
  size, bias = job.size, job.bias
  assert bias is not None  # without one nobody asks for its gradient

  def kernel(step, x, d_bias, total):
    @pl.when(step.first)
    def _():
      total[...] = jnp.zeros_like(total)

    top, log_sum, delta = (_turned(ref[...]) for ref in (x.top, x.log_sum, x.delta))
    scored = x.query[...], x.key[...], x.bias[...]
    logits, _, shown = step.scores(x, *scored, (True, True))
    d_weights = steps.dot(x.d_out[...], x.value[...], (1, 1))
    weights = steps.weights(logits, job.powers, top, log_sum)
    total[...] += shown.hide(steps.score_gradient(weights, d_weights, delta, None), 0.0)

    @pl.when(step.last)
    def _():
      d_bias[...] = total[...].astype(d_bias.dtype)

  results = (("yzqk", bias.shape, bias.dtype),)
  return _call(job, kernel, _by_bias(job, bias), results, [(size.queries, size.keys)])[0]


def _put(refs: Any, values: Any) -> None:
  for ref, value in zip(refs, values, strict=True):
    ref[...] = value


def _read(ref: Any) -> Array | None:
  return None if ref is None else ref[...]


def _turned(x: Array) -> Array:
  """[1, n] as [n, 1] and the reverse, by transposing whole registers."""
  if x.shape[0] == 1:
    return jnp.broadcast_to(x, (_LANES, x.shape[1])).T[:, :1]
  return jnp.broadcast_to(x, (x.shape[0], _LANES)).T[:1, :]


@dataclasses.dataclass(frozen=True)
class _Route(Place):
  """A place whose blocks follow a walk.

  Attributes:
    walk: of the lists; None visits every tile, as a partial one.
    entry: where a program's step is in the walk's arrays, from the program's indices.
    repeats: how many programs in a row, by their last index, work on one step.
    keys_across: whether keys lie along the last axis of a tile.
  """

  walk: walks.Walk | None
  entry: Any
  repeats: int
  keys_across: bool


def _by_rows(job: Job) -> _Route:
  """The tiles of each row of tiles, for each query head and batch row."""
  B, _, N, _ = job.query.shape
  walk = walks.Walk.of(job.lists, job.tiles[1])
  axes = {
    "b": (None, lambda b, n, s, *lists: b),
    "n": (None, lambda b, n, s, *lists: n),
    "m": (None, lambda b, n, s, *lists: lax.div(n, job.group)),
    "q": (job.size.queries, lambda b, n, s, row, tile, kind: row[walk.entry(b, n, s)]),
    "k": (job.size.keys, lambda b, n, s, row, tile, kind: tile[walk.entry(b, n, s)]),
  }
  return _Route((B, N, walk.used), axes, walk, walk.entry, 1, True)


def _by_columns(job: Job) -> _Route:
  """The tiles of each column, for key-value heads where the lists are one for all query heads."""
  B, _, N, _ = job.query.shape
  walk = walks.Walk.of(job.lists, job.tiles[0])
  repeats = job.group if walk.heads == 1 else 1
  query_head = lambda x, g: x * repeats + g
  entry = lambda b, x, s, g: walk.entry(b, query_head(x, g), s)
  axes = {
    "b": (None, lambda b, x, s, g, *lists: b),
    "x": (None, lambda b, x, s, g, *lists: x),
    "n": (None, lambda b, x, s, g, *lists: query_head(x, g)),
    "m": (None, lambda b, x, s, g, *lists: lax.div(query_head(x, g), job.group)),
    "q": (job.size.queries, lambda b, x, s, g, row, tile, kind: tile[entry(b, x, s, g)]),
    "k": (job.size.keys, lambda b, x, s, g, row, tile, kind: row[entry(b, x, s, g)]),
  }
  return _Route((B, N // repeats, walk.used, repeats), axes, walk, entry, repeats, False)


def _by_bias(job: Job, bias: Array) -> _Route:
  """The tiles of the bias, and for each the batch rows and heads that share it."""
  B, _, N, _ = job.query.shape
  b, n = bias.shape[:2]
  shared = N // n
  axes = {
    "y": (None, lambda y, z, i, j, r: y),
    "z": (None, lambda y, z, i, j, r: z),
    "b": (None, lambda y, z, i, j, r: y + lax.div(r, shared)),
    "n": (None, lambda y, z, i, j, r: z + lax.rem(r, shared)),
    "m": (None, lambda y, z, i, j, r: lax.div(z + lax.rem(r, shared), job.group)),
    "q": (job.size.queries, lambda y, z, i, j, r: i),
    "k": (job.size.keys, lambda y, z, i, j, r: j),
  }
  repeats = B // b * shared
  return _Route((b, n, *job.tiles, repeats), axes, None, None, repeats, True)


class _Step:
  """What a program has to do."""

  def __init__(self, job: Job, route: _Route, lists: tuple[Any, ...]):
    self.job, self.route = job, route
    ids = tuple(pl.program_id(axis) for axis in range(len(route.grid)))
    repeat = ids[-1] if route.repeats > 1 or route.walk is None else 0
    self.kind = lists[2][route.entry(*ids)] if lists else walks.PARTIAL | walks.FIRST | walks.LAST
    self.first = (self.kind & walks.FIRST != 0) & (repeat == 0)
    self.last = (self.kind & walks.LAST != 0) & (repeat == route.repeats - 1)
    self.key_tile, self.query_tile = (route.axes[kind][1](*ids, *lists) for kind in "kq")

  def visit(self, x: Any, tile: Any, state: Any) -> None:
    """Puts `tile((masked, exact), *state)` into the state if there is a tile to visit.

    Where something may be hidden, and what the tile gives is not finite, as 0 · NaN is not, what it
    gives exactly.
    """
    run = lambda *how: tile(how, *(ref[...] for ref in state))

    def visit(masked):
      found = run(masked, False)
      if not (masked or self.job.adds):
        _put(state, found)
        return
      good = steps.finite(*found)
      pl.when(good)(lambda: _put(state, found))
      pl.when(~good)(lambda: _put(state, run(masked, True)))

    for flag, present in ((walks.FULL, self.job.any_full), (walks.PARTIAL, self.job.any_partial)):
      if present:
        pl.when(self.kind & flag != 0)(functools.partial(visit, flag == walks.PARTIAL))

  def scores(self, x: Any, a: Array, b: Array, bias: Array | None, how: tuple[bool, bool]):
    """As `Job.scores`."""
    job, size, axis = self.job, self.job.size, int(self.route.keys_across)
    queries = keys = at = None
    if how[0] or job.term is not None:
      shape = (size.queries, size.keys) if axis else (size.keys, size.queries)
      at = self.key_tile * size.keys + lax.broadcasted_iota(jnp.int32, shape, axis)
      whole = lambda tree: jax.tree.map(lambda ref: jnp.broadcast_to(ref[...], shape), tree)
      queries, keys = whole(x.queries), whole(x.keys)
    return job.scores(a, b, queries, keys, at, self._line(x), bias, _read(x.cap), how)

  def _line(self, x: Any) -> Any:
    """A function that gives the tile's entries of the lines, which lie on its diagonals."""
    size = self.job.size
    along, across = (self.query_tile, size.queries), (self.key_tile, size.keys)
    if not self.route.keys_across:
      along, across = across, along
    (i, rows), (j, columns) = along, across
    tiles = self.job.tiles[0 if self.route.keys_across else 1]

    def tile(ref):
      start = j * columns - i * rows + (tiles - 1) * rows
      start = pl.multiple_of(start, math.gcd(rows, columns))
      part = jnp.broadcast_to(ref[:, pl.ds(start, rows + columns)], (rows, rows + columns))
      return pltpu.roll(part, columns + 1, 1, stride=1, stride_axis=0)[:, :columns]

    return lambda q, k: jax.tree.map(tile, x.line)


def _call(
  job: Job,
  kernel: Any,
  route: _Route,
  results: tuple[tuple[str, tuple[int, ...], Any], ...],
  scratch: list[tuple[int, int]],
) -> tuple[Array, ...]:
  """Runs `kernel(step, operands, *results, *scratch)`; an operand there is not is None."""
  operands, kinds = _operands(job, route.keys_across)
  spec = lambda name: jax.tree.map(lambda x: route.spec(x.shape, kinds[name]), operands[name])
  lists = () if route.walk is None else route.walk.arrays

  def body(*refs):
    x, *rest = refs[len(lists) :]
    kernel(_Step(job, route, refs[: len(lists)]), SimpleNamespace(**x), *rest)

  last = len(route.grid) - 2
  grid = route.grid
  if job.settings.interpret:
    grid = tuple(n if isinstance(n, int) else interpreted.unmarked(n) for n in grid)
  call = pl.pallas_call(
    body,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(lists),
      grid=grid,
      in_specs=[{name: spec(name) for name in operands}],
      out_specs=[route.spec(shape, kinds) for kinds, shape, _ in results],
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    ),
    out_shape=[job.settings.result(shape, dtype, job.query) for _, shape, dtype in results],
    name=kernel.__qualname__.split(".")[0].lstrip("_"),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=(pltpu.PARALLEL,) * 2 + (pltpu.ARBITRARY,) * last
    ),
    interpret=job.settings.interpret,
  )
  return job.settings.run(call, *lists, operands)


def _operands(job: Job, keys_across: bool) -> tuple[dict[str, Any], dict[str, str]]:
  """Arrays with heads before lengths, and lines laid along or across a tile; and their kinds."""
  heads_first = dict.fromkeys(("query", "d_out"), "bnqh")
  heads_first |= dict.fromkeys(("key", "value"), "bmkh")
  lines = ("top", "log_sum", "delta")
  along, across = np.s_[..., None], np.s_[:, :, None]
  queries, keys = (along, across) if keys_across else (across, along)
  place = lambda tree, at: jax.tree.map(lambda x: x[at], tree)
  # Row r of a tile begins r entries earlier in a line: of keys across the greatest distance first.
  turn = lambda x: jnp.pad(x[..., ::-1] if keys_across else x, ((0, 0), (0, 0), (0, 1)))[:, :, None]
  operands = {"bias": job.bias, "line": jax.tree.map(turn, job.line), "cap": job.cap}
  operands |= {
    name: jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), getattr(job, name)) for name in heads_first
  }
  operands |= {name: place(job.lines.get(name), across) for name in lines}
  operands |= {"queries": place(job.queries, queries), "keys": place(job.keys, keys)}
  kinds = heads_first | dict.fromkeys(lines, "bn1q") | {"bias": "bnqk", "line": "bn1.", "cap": ".."}
  kinds |= {"queries": "bnq1" if keys_across else "bn1q", "keys": "bn1k" if keys_across else "bnk1"}
  return operands, kinds


def refusal(terms: Terms | None) -> str | None:
  """Why the kernels cannot take these terms, or None."""
  if terms is None or terms.diagonal or not jax.tree.leaves(terms.line):
    return None
  return (
    "scores of distances with query_positions, which a TPU would have to look up one by one; "
    "implementation='xla' takes them"
  )


KERNELS = Kernels(_forward, _queries, _keys, _bias, refusal, "tpu", lambda width: width)


@row_bias.outside
def attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  *,
  sizes: Sizes | None = None,
  interpret: bool = False,
  **arguments: Any,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
  """Attention and its log-sum-exp; arguments and results as of `tiled.xla.attention`.

  Args:
    sizes: of the tiles, multiples of 128; from the device's table when None.
    interpret: run on any device, to check the kernels.

  Raises:
    ValueError: for heads wider than 256, or types other than float32, bfloat16 and float16.
  """
  return frame.attention(KERNELS, query, key, value, sizes=sizes, interpret=interpret, **arguments)
