"""Fused attention on NVIDIA GPUs, in Triton through Pallas.

A program takes one tile of queries (for dK and dV one of keys), goes through its list of tiles,
first those that need no mask, and keeps what it sums in registers. A long list is worked on by
several programs, a piece of it by each.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from effjax.core.typing import Array, Float
from effjax.kernels.flash_attention import row_bias
from effjax.kernels.flash_attention.fused import few, folding, frame, joins, pieces, programs, steps
from effjax.kernels.flash_attention.fused.jobs import Job, Kernels
from effjax.kernels.flash_attention.fused.pieces import Pieces
from effjax.kernels.flash_attention.fused.places import Place
from effjax.kernels.flash_attention.fused.sizes import Sizes


def _scores(job: Job, x: Any, here: Any, there: Any, k: Array, queries: Any, how: Any) -> Any:
  """`job.scores` of the queries `here`, of which `queries` is known, and the keys k `there`."""
  keys, at = _across(x.keys, there), _positions(there.start, (1, there.size))
  bias = None if x.bias is None else x.bias[here, there]
  line = _entries(job, x, lambda ref: ())
  return job.scores(x.query[here, :], k, queries, keys, at, line, bias, _cap(x), how)


def _forward(job: Job) -> tuple[Array, ...]:
  size = job.size

  def kernel(x, *results):
    piece, row, store = _piece(x, pl.program_id(2), size.queries, results)

    def put(here, rows, exact):
      def tiles(masked):
        rows_of = jax.tree.map(lambda ref: ref[here][:, None], x.queries)

        def tile(j, n, carry):
          there = pl.ds(j * n, n)
          k = x.key[there, :]
          logits, _, shown = _scores(job, x, here, there, k, rows_of, (masked, exact))
          return steps.accumulate(carry, logits, x.value[there, :], shown, job.powers)

        return tile

      start = steps.start(rows, job.value.shape[-1])
      carry = _visit(job, x.lists, (), piece, size.keys, tiles, start, exact)
      result, *sums = steps.finish(*carry)
      store(here, result, *(line[:, 0] for line in sums))
      return result

    _exactly(job, put, row, size.queries)

  B, T, N, _ = job.query.shape
  out = jax.ShapeDtypeStruct((B, T, N, job.value.shape[-1]), job.query.dtype)
  line = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
  cut = Pieces.of(job.lists, B * N, splits=job.settings.splits)
  place = programs.by_rows(job, cut.count)
  join = functools.partial(joins.attended, log2=job.powers.outer)
  return _whole(job, kernel, place, cut, join, ("bqnh", out), ("bnq", line), ("bnq", line))


def _queries(job: Job) -> Array:
  size = job.size

  def kernel(x, *results):
    piece, row, store = _piece(x, pl.program_id(2), size.queries, results)

    def put(here, rows, exact):
      top, log_sum, delta = (x.lines[name][here][:, None] for name in _LINES)

      def tiles(masked):
        rows_of = jax.tree.map(lambda ref: ref[here][:, None], x.queries)

        def tile(j, n, carry):
          there = pl.ds(j * n, n)
          k = x.key[there, :]
          logits, slope, shown = _scores(job, x, here, there, k, rows_of, (masked, exact))
          weights = job.powers(logits, top)
          d_weights = steps.dot(x.d_out[here, :], x.value[there, :], (1, 1))
          return carry + shown.dot(steps.score_gradient(weights, d_weights, delta, slope), k)

        return tile

      start = jnp.zeros((rows, job.query.shape[-1]), jnp.float32)
      total = _visit(job, x.lists, (), piece, size.keys, tiles, start, exact)
      total = total * (job.settings.scale * jnp.exp2(-log_sum))
      store(here, total)
      return total

    _exactly(job, put, row, size.queries)

  B, _, N, _ = job.query.shape
  cut = Pieces.of(job.lists, B * N)
  place = programs.by_rows(job, cut.count)
  return _whole(job, kernel, place, cut, joins.added, ("bqnh", job.query))[0]


def _keys(job: Job) -> tuple[Array, Array]:
  size = job.size

  def kernel(x, *results):
    piece, column, store = _piece(x, pl.program_id(1), size.keys, results, (0,))

    def put(here, rows, exact):
      k, v = x.key[here, :], x.value[here, :]
      ends = ("top", "log_sum") if exact or job.adds else ("lse",)

      def head(g, carry):
        of_head = lambda ref: g if ref.shape[0] > 1 else 0
        line = _entries(job, x, lambda ref: (of_head(ref),))

        def tiles(masked):
          columns = jax.tree.map(lambda ref: ref[of_head(ref), here][:, None], x.keys)

          def tile(i, n, carry):
            d_k, d_v = carry
            there = pl.ds(i * n, n)
            queries = jax.tree.map(lambda ref: ref[of_head(ref), there][None, :], x.queries)
            at = _positions(here.start, (rows, 1))
            bias = None if x.bias is None else x.bias[of_head(x.bias), there, here].T
            q, d_out = x.query[there, g, :], x.d_out[there, g, :]
            of_rows = lambda name: x.lines[name][g, there][None, :]  # late, for registers' sake
            given = line, bias, _cap(x), (masked, exact)
            logits, slope, shown = job.scores(k, q, queries, columns, at, *given)
            weights = steps.weights(logits, job.powers, *map(of_rows, ends))
            d_weights = steps.dot(v, d_out, (1, 1))
            gradient = steps.score_gradient(weights, d_weights, of_rows("delta"), slope)
            return d_k + shown.dot(gradient, q), d_v + shown.dot(weights, d_out)

          return tile

        listed = of_head(x.lists.offset)
        return _visit(job, x.lists, (listed,), piece, size.queries, tiles, carry, exact)

      start = tuple(jnp.zeros((rows, a.shape[-1]), jnp.float32) for a in (k, v))
      d_k, d_v = lax.fori_loop(0, job.group, head, start)
      store(here, d_k * job.settings.scale, d_v)
      return d_k  # not finite where d_v is not

    _exactly(job, put, column, size.keys, always=True)

  B, _, K, _ = job.key.shape
  cut = Pieces.of(job.lists, B * K, job.group)
  place, results = programs.by_columns(job, cut.count), (("bkmh", job.key), ("bkmh", job.value))
  d_key, d_value = _whole(job, kernel, place, cut, joins.added, *results)
  return d_key, d_value


def _bias(job: Job) -> Array:
  """Sums over the batch rows and heads that the bias is shared by; visits every tile."""
  size, heads, bias = job.size, job.query.shape[2], job.bias
  assert bias is not None  # without one nobody asks for its gradient

  def kernel(x, d_bias):
    j = pl.program_id(1)
    batch, shared = x.query.shape[0], x.query.shape[2]

    def add(n, total):
      b, g = lax.div(n, shared), lax.rem(n, shared)
      kv = lax.div(g, job.group) if shared == heads else 0
      of = lambda ref: (b if ref.shape[0] > 1 else 0, g if ref.shape[1] > 1 else 0)
      rows = jax.tree.map(lambda ref: ref[(*of(ref), slice(None))][:, None], x.queries)
      columns = jax.tree.map(lambda ref: ref[(*of(ref), slice(None))][None, :], x.keys)
      at, line = _positions(j * size.keys, (1, size.keys)), _entries(job, x, of)
      q, k = x.query[b, :, g, :], x.key[b, :, kv, :]
      top, log_sum, delta = (x.lines[name][b, g, :][:, None] for name in _LINES)
      given = x.bias[0, 0], _cap(x), (True, True)
      logits, _, shown = job.scores(q, k, rows, columns, at, line, *given)
      weights = steps.weights(logits, job.powers, top, log_sum)
      d_weights = steps.dot(x.d_out[b, :, g, :], x.value[b, :, kv, :], (1, 1))
      return total + shown.hide(steps.score_gradient(weights, d_weights, delta, None), 0.0)

    start = jnp.zeros((size.queries, size.keys), jnp.float32)
    d_bias[0, 0] = lax.fori_loop(0, batch * shared, add, start).astype(d_bias.dtype)

  return _call(job, kernel, programs.by_bias(job, bias), Pieces(job.lists), ("bnqk", bias))[0]


def _visit(
  job: Job,
  lists: Any,
  head: tuple[Any, ...],
  i: Array,
  size: int,
  tiles: Any,
  carry: Any,
  exact: bool,
) -> Any:
  """Folds `tiles(masked)(j, size, carry)` over the list of piece i.

  The full tiles come first, then the partial ones: what `tiles` reads takes registers in one loop
  alone. Exactly, all count as partial and are taken in parts, tiles of size `_PART`.
  """
  begin, middle, end = lists.offset[*head, i], lists.partial[*head, i], lists.offset[*head, i + 1]
  parts = size // _PART if exact else 1
  at = lambda n: lists.index[*head, lax.div(n, parts)] * parts + lax.rem(n, parts)
  loops = [(begin, middle, False)] * job.any_full + [(middle, end, True)] * job.any_partial
  if exact:
    loops = [(begin, end, job.any_partial)]

  state = at(begin * parts), carry
  for first, last, masked in loops:
    tile = tiles(masked)
    # The next tile's number is read an iteration ahead: its loads would wait for it.
    step = lambda n, state, tile=tile: (at(n + 1), tile(state[0], size // parts, state[1]))
    state = lax.fori_loop(first * parts, last * parts, step, state)
  return state[1]


def _power(x: Array, factor: float, y: Any) -> Array:
  """2^(factor · x − y) in two instructions of five; zero where that is below 2^−126."""
  bits = np.float32(factor).view(np.uint32)
  (power,) = plgpu.elementwise_inline_asm(
    f"{{ .reg .f32 e; fma.rn.ftz.f32 e, $1, 0f{bits:08x}, $2; ex2.approx.ftz.f32 $0, e; }}",
    args=[x, jnp.broadcast_to(-y, x.shape)],
    constraints="=f,f,f",
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
  )
  return power


def _exactly(job: Job, put: Callable[..., Any], i: Array, rows: int, always: bool = False) -> None:
  """`put(rows, number, exact)` of tile i's rows, and again where what it gives is not finite.

  Zero times a NaN that is hidden is not. Exactly, a few rows at a time need the fewest registers.
  """
  good = steps.finite(*jax.tree.leaves(put(pl.ds(i * rows, rows), rows, False)))
  if always or job.hides:

    @pl.when(~good)
    def _():

      @pl.loop(0, rows // _PART)
      def _(n):
        put(pl.ds(i * rows + n * _PART, _PART), _PART, True)


def _across(keys: Any, here: Any) -> Any:
  return jax.tree.map(lambda ref: ref[here][None, :], keys)


def _positions(first: Any, shape: tuple[int, int]) -> Array:
  """Of keys from `first` on, along the axis of `shape` that is not one."""
  return first + lax.broadcasted_iota(jnp.int32, shape, int(shape[0] == 1))


def _entries(job: Job, x: Any, head: Callable[[Any], tuple[Any, ...]]) -> Callable[..., Any]:
  """A function from positions to the entries of the lines at `head`, looked up one by one."""
  return lambda q, k: jax.tree.map(lambda ref: ref[(*head(ref), job.entry(q, k))], x.line)


def _cap(x: Any) -> Array | None:
  return None if x.cap is None else x.cap[0, 0]


def _piece(
  x: Any, i: Array, size: int, results: tuple[Any, ...], head: tuple[int, ...] = ()
) -> tuple[Any, Any, Callable[..., None]]:
  """The piece that comes i-th, its row of tiles, and what stores its results of some rows."""
  piece = i if x.order is None else x.order[*head, i]

  def put(refs, at, values):
    for ref, value in zip(refs, values, strict=True):
      ref[at] = value.astype(ref.dtype)

  if x.row is None:
    return piece, piece, lambda here, *values: put(results, here, values)
  row, slot, number = x.row[*head, piece], x.slot[*head, piece], len(results) // 2

  def store(here, *values):
    @pl.when(slot < 0)
    def _():
      put(results[:number], here, values)

    @pl.when(slot >= 0)
    def _():
      put(results[number:], (slot, pl.ds(here.start - row * size, here.size)), values)

  return piece, row, store


_LINES = "top", "log_sum", "delta"
_OPERANDS = {
  "lists": "bn.",
  "order": "bn.",
  "row": "bn.",
  "slot": "bn.",
  "queries": "bnq",
  "keys": "bnk",
  "query": "bqnh",
  "key": "bkmh",
  "value": "bkmh",
  "bias": "bnqk",
  "d_out": "bqnh",
  "lines": "bnq",
  "line": "bn.",
  "cap": "..",
}
_OF_PIECES = "lists", "order", "row", "slot"


def _whole(
  job: Job, kernel: Any, place: Place, cut: Pieces, join: Any, *results: joins.Result
) -> tuple[Array, ...]:
  """`_call`, with pieces of rows joined where lists are cut."""
  size = job.size.keys if "k" in results[0][0] else job.size.queries
  parts = joins.slots(cut, results, size)
  found = _call(job, kernel, place, cut, *results, *parts)
  return joins.joined(job, cut, join, results, parts, found) if parts else found


def _call(
  job: Job, kernel: Any, place: Place, cut: Pieces, *results: joins.Result
) -> tuple[Array, ...]:
  """Runs `kernel(operands, *results)` over the grid; an operand there is not is None."""
  source = lambda name: cut if name in _OF_PIECES else job
  operands = {name: getattr(source(name), name) for name in _OPERANDS}
  spec = lambda name: jax.tree.map(lambda x: place.spec(x.shape, _OPERANDS[name]), operands[name])
  call = pl.pallas_call(
    lambda refs, *outputs: kernel(SimpleNamespace(**refs), *outputs),
    grid=place.grid,
    in_specs=[{name: spec(name) for name in operands}],
    out_specs=[place.spec(like.shape, kinds) for kinds, like in results],
    out_shape=[job.settings.result(like.shape, like.dtype, job.query) for _, like in results],
    name=kernel.__qualname__.split(".")[0].lstrip("_"),
    compiler_params=plgpu.CompilerParams(num_warps=job.size.warps, num_stages=job.size.stages),
    interpret=job.settings.interpret,
  )
  return job.settings.run(call, operands)


_PART = 16  # the least side of a product
_LEAST = 256  # keys for which a part is worth its own program
_FEW = 64  # queries that one tile holds

KERNELS = Kernels(
  _forward, _queries, _keys, _bias, lambda terms: None, "gpu", pl.next_power_of_2, _power
)


@row_bias.outside
def attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  *,
  sizes: Sizes | None = None,
  splits: int | None = None,
  interpret: bool = False,
  **arguments: Any,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
  """Attention and its log-sum-exp; arguments and results as of `tiled.xla.attention`.

  A few queries against a cache would leave most of a GPU idle: the heads that share keys then count
  as queries (`folding`), and the keys are worked on in parts (`few`).

  Args:
    sizes: of the tiles, powers of two from 16; from the device's table when None.
    splits: parts of the keys; as many as fill the device when None.
    interpret: run on any device, to check the kernels.

  Raises:
    ValueError: for heads wider than 256, or types other than float32, bfloat16 and float16.
  """
  (B, T, N, _), (S, K) = query.shape, key.shape[1:3]
  folded = folding.fits(query, key, **arguments)
  if splits is None:
    heads = B * (K if folded else N)
    splits = max(1, min(pieces.PROGRAMS // heads, S // _LEAST)) if T <= _FEW else 1
  kernels = dataclasses.replace(KERNELS, few=few.forward) if folded else KERNELS
  run: Callable[..., Any] = functools.partial(
    frame.attention, kernels, sizes=sizes, splits=splits, interpret=interpret
  )
  if folded:
    run = functools.partial(folding.attention, run)
  return run(query, key, value, **arguments)
