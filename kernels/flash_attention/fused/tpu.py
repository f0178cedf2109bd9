"""Fused attention on TPUs, in Mosaic through Pallas.

What a row sums stays in VMEM from its first tile to its last. The gradients take the tiles by
columns: what is summed for keys and values stays in VMEM, what is summed for queries goes to main
memory and back. No product is computed twice, and whatever the mask, the price is one dQ in float32
and its way, which takes less time than the tile's five products.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effjax.core.typing import Array, Float
from effjax.kernels.flash_attention import row_bias
from effjax.kernels.flash_attention.fused import frame, routes, steps, totals, walks
from effjax.kernels.flash_attention.fused.jobs import Job, Kernels
from effjax.kernels.flash_attention.fused.mosaic import Step, call
from effjax.kernels.flash_attention.fused.sizes import Sizes
from effjax.kernels.flash_attention.tile_map.terms import Terms


def _forward(job: Job) -> tuple[Array, ...]:
  """Rows in parts: the scores of the next are under way while this one's are summed up."""
  B, T, N, _ = job.query.shape
  Hv, rows, size = job.value.shape[-1], job.size.queries, job.size.part or job.size.queries
  route = routes.by_rows(job)

  def kernel(step, x, out, top, log_sum, *state):
    mine = lambda ref: ref.at[step.repeat]
    query, state = mine(x.query), [mine(ref) for ref in state]

    @pl.when(step.first)
    def _():
      _put(state, steps.start(rows, Hv, totals.LANES))

    def tile(how):
      def scores(start):
        part = slice(start, start + size)
        bias = None if x.bias is None else x.bias[part, :]
        return step.scores(x, query[part, :], x.key[...], bias, how, start)

      following = scores(0)
      for start in range(0, rows, size):
        logits, _, shown = following
        if start + size < rows:
          following = scores(start + size)
        part = [ref.at[start : start + size, :] for ref in state]
        carry = tuple(ref[...] for ref in part)
        found = steps.accumulate(carry, logits, x.value[...], shown, job.powers, _wide)
        yield (lambda *values, part=part: _put(part, values)), found

    step.visit(tile)

    @pl.when(step.last)
    def _():
      total, highest, result = (ref[...] for ref in state)
      mine(out)[...] = (result / _wide(steps.some(total), Hv)).astype(out.dtype)
      _put(map(mine, (top, log_sum)), steps.ends(_turned(total), _turned(highest)))

  line = ("bg1q", (B, N, 1, T), jnp.float32)
  results = ("bgqh", (B, N, T, Hv), job.query.dtype), line, line
  scratch = [_floats(route.repeats, rows, width) for width in (totals.LANES, totals.LANES, Hv)]
  out, *sums = call(job, kernel, route, results, scratch)
  return jnp.swapaxes(out, 1, 2), *(x[:, :, 0] for x in sums)


def _keys(job: Job) -> tuple[Array, Array, Array]:
  B, T, N, H = job.query.shape
  S, K, Hv = job.key.shape[1], job.key.shape[2], job.value.shape[-1]
  rows, columns = job.size.keys, job.size.queries
  size = job.size.part or rows
  route = routes.by_columns(job)

  def kernel(step, x, d_key, d_value, d_query, key_sum, value_sum, *travelling):
    query_sum = _travelling(step, d_query, *travelling)
    query_sum.load()

    @pl.when(step.first)
    def _():
      _put((key_sum, value_sum), (jnp.zeros((rows, width), jnp.float32) for width in (H, Hv)))

    def tile(how):
      q, d_out, across = x.query[...], x.d_out[...], jnp.zeros((columns, H), jnp.float32)
      top, log_sum, delta = _lines(x)
      for start in range(0, rows, size):
        part = slice(start, start + size)
        k = x.key[part, :]
        bias = None if x.bias is None else x.bias[:, part].astype(jnp.float32).T
        logits, slope, shown = step.scores(x, k, q, bias, how, start)
        weights = steps.weights(logits, job.powers, top, log_sum)
        d_weights = steps.dot(x.value[part, :], d_out, (1, 1))
        gradient = steps.score_gradient(weights, d_weights, delta, slope)
        across += shown.dot(gradient, k, (0, 0))
        sums = [ref.at[part, :] for ref in (key_sum, value_sum)]
        found = shown.dot(gradient, q), shown.dot(weights, d_out)
        yield (lambda *values, sums=sums: _add(sums, values)), found
      yield query_sum.add, (across,)

    step.visit(tile)
    pl.when(step.kind & (walks.FULL | walks.PARTIAL) == 0)(query_sum.arrive)
    query_sum.store()

    @pl.when(step.last)
    def _():
      d_key[...] = (key_sum[...] * job.settings.scale).astype(d_key.dtype)
      d_value[...] = value_sum[...].astype(d_value.dtype)

  heads = route.grid[1]
  kinds = (job.key.dtype, job.value.dtype) if heads == K else (jnp.float32,) * 2
  results = ("bxkh", (B, heads, S, H), kinds[0]), ("bxkh", (B, heads, S, Hv), kinds[1])
  total = None, (B, N, T, totals.width(H)), jnp.float32
  scratch = [_floats(rows, H), _floats(rows, Hv), *totals.scratch(columns, H)]
  d_key, d_value, d_query = call(job, kernel, route, (*results, total), scratch)
  like = lambda d, x: d.reshape(B, K, -1, *d.shape[2:]).sum(2).swapaxes(1, 2).astype(x.dtype)
  d_query = (d_query[..., :H] * job.settings.scale).astype(job.query.dtype)
  return like(d_key, job.key), like(d_value, job.value), jnp.swapaxes(d_query, 1, 2)


def _travelling(step: Step, whole: Any, buffers: Any, semaphores: Any) -> totals.Total:
  """The gradient of the step's queries."""
  b, x, s, g = step.ids
  rows, repeats = step.job.size.queries, step.route.repeats
  here = pl.ds(pl.multiple_of(step.at("q") * rows, rows), rows)
  before = step.at("q", (b, x, jnp.maximum(s - 1, 0), g))
  again = (s > 0) & (step.at("q") == before) if repeats == 1 else None
  last = (s == pl.num_programs(2) - 1) & (g == repeats - 1)
  tile = whole.at[step.at("b"), step.at("n"), here, :]
  return totals.Total(tile, buffers, semaphores, s * repeats + g, again, last)


def _bias(job: Job) -> Array:
  """Sums over the batch rows and heads that the bias is shared by; visits every tile."""
  size, bias = job.size, job.bias
  assert bias is not None  # without one nobody asks for its gradient

  def kernel(step, x, d_bias, total):
    @pl.when(step.first)
    def _():
      total[...] = jnp.zeros_like(total)

    top, log_sum, delta = (_wide(_turned(line), size.keys) for line in _lines(x))
    scored = x.query[...], x.key[...], x.bias[...]
    logits, _, shown = step.scores(x, *scored, (True, True))
    d_weights = steps.dot(x.d_out[...], x.value[...], (1, 1))
    weights = steps.weights(logits, job.powers, top, log_sum)
    total[...] += shown.hide(steps.score_gradient(weights, d_weights, delta, None), 0.0)

    @pl.when(step.last)
    def _():
      d_bias[...] = total[...].astype(d_bias.dtype)

  results = (("yzqk", bias.shape, bias.dtype),)
  scratch = [_floats(size.queries, size.keys)]
  return call(job, kernel, routes.by_bias(job, bias), results, scratch)[0]


def _lines(x: Any) -> list[Array]:
  """Maximum, log₂ of the sum and delta of a tile's queries, [1, queries] each."""
  return [x.lines[n : n + 1, :] for n in range(3)]


def _floats(*shape: int) -> Any:
  return pltpu.VMEM(shape, jnp.float32)


def _put(refs: Any, values: Any) -> None:
  for ref, value in zip(refs, values, strict=True):
    ref[...] = value


def _add(refs: Any, values: Any) -> None:
  for ref, value in zip(refs, values, strict=True):
    ref[...] += value


def _wide(x: Array, columns: int) -> Array:
  """[n, LANES], the same in all lanes, as [n, columns], without a word between lanes."""
  return jnp.tile(x, (1, -(-columns // totals.LANES)))[:, :columns]


def _turned(x: Array) -> Array:
  """[1, n] as [n, LANES], the same in all lanes, and the reverse."""
  return jnp.broadcast_to(x, (totals.LANES, x.shape[1])).T if x.shape[0] == 1 else x.T[:1, :]


def refusal(terms: Terms | None) -> str | None:
  """Why the kernels cannot take these terms, or None."""
  if terms is None or terms.diagonal or not jax.tree.leaves(terms.line):
    return None
  return (
    "scores of distances with query_positions, which a TPU would have to look up one by one; "
    "implementation='xla' takes them"
  )


KERNELS = Kernels(_forward, None, _keys, _bias, refusal, "tpu", lambda width: width)


@row_bias.outside
def attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  *,
  sizes: Sizes | None = None,
  interpret: bool | pltpu.InterpretParams = False,
  **arguments: Any,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
  """Attention and its log-sum-exp; arguments and results as of `tiled.xla.attention`.

  Args:
    sizes: of the tiles, multiples of 128; from the device's table when None.
    interpret: run on any device, to check the kernels, and how.

  Raises:
    ValueError: for heads wider than 256, or types other than float32, bfloat16 and float16.
  """
  return frame.attention(KERNELS, query, key, value, sizes=sizes, interpret=interpret, **arguments)
