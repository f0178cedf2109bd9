"""A few queries against a cache on NVIDIA GPUs, in two launches.

A program takes all queries of a key-value head and a part of the keys. It asks the predicate which
of its tiles hold a key that is seen, so that no list is needed, and goes through these; a second
kernel joins the parts. Nothing is padded: what lies beyond an array is not loaded.
"""

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from effjax.core.typing import Array, Float
from effjax.kernels.flash_attention.fused import steps
from effjax.kernels.flash_attention.fused.jobs import Settings
from effjax.kernels.flash_attention.fused.places import Place
from effjax.kernels.flash_attention.tile_map.sight import Sight, Where
from effjax.kernels.flash_attention.tile_map.terms import Terms

_PIECE = 16  # the least side of a product


def forward(
  settings: Settings,
  query: Float[Array, "B T K H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  where: Where,
  terms: Terms | None,
) -> tuple[Array, ...]:
  """Output [B, T, K, Hv], log-sum-exp [B, T, K] and its two parts, see `frame.attention`.

  Args:
    terms: a soft cap that is data, if anything.
  """
  cap = None if terms is None else terms.softcap
  sight = Sight.of(where, query.shape[1], key.shape[1], query.shape[1], settings.sizes.forward.keys)
  parts = _parts(settings, query, key, value, sight, cap)
  powers = settings.powers(False, cap is not None)
  out, *lines = _joined(settings, parts, query, value.shape[-1], powers)
  return jnp.swapaxes(out, 1, 2), *(jnp.swapaxes(x, 1, 2) for x in lines)


def _parts(
  settings: Settings, query: Array, key: Array, value: Array, sight: Sight, cap: Array | None
) -> tuple[Array, ...]:
  """Of each part the output [P, B, K, rows, Hv], maximum and log₂ of the sum [P, B, K, rows]."""
  (B, T, K, H), S, Hv = query.shape, key.shape[1], value.shape[-1]
  size, splits, rows = settings.sizes.forward, settings.splits, _rows(T)
  tiles = -(-S // size.keys)
  share = -(-tiles // splits)
  powers = settings.powers(False, cap is not None)
  read = _flags(sight)

  def kernel(x, out, top, log_sum):
    begin = pl.program_id(0) * share
    end = jnp.minimum(begin + share, tiles)
    own = jnp.minimum(lax.iota(jnp.int32, rows), T - 1)
    q_known = jax.tree.map(
      lambda ref: ref[own if ref.shape[0] > 1 else own * 0][:, None], x.queries
    )
    q = _load(x.query, own, H)
    softcap = settings.softcap if x.cap is None else x.cap[0, 0]

    def seen(first, n):
      at = first + lax.iota(jnp.int32, n)
      inside = jnp.minimum(at, S - 1)
      k_known = jax.tree.map(lambda ref: ref[inside][None], x.keys)
      return jnp.broadcast_to(sight.seen(*read(q_known, k_known), at[None]), (rows, n)), at

    def look(j, found):
      some = jnp.sum(jnp.where(seen(j * size.keys, size.keys)[0], 1.0, 0.0)) > 0
      low, high = found
      return jnp.where(some, jnp.minimum(low, j), low), jnp.where(some, j + 1, high)

    low, high = lax.fori_loop(begin, end, look, (end, begin))

    def put(n, exact):
      def tile(j, carry):
        shows, at = seen(j * n, n)
        inside = at < S if S % size.keys else None
        shown = steps.Shown(shows, exact)
        k, v = (_load(ref, at, width, inside) for ref, width in ((x.key, H), (x.value, Hv)))
        logits, _ = steps.scores(q, k, None, shown, settings.scale, softcap)
        return steps.accumulate(carry, logits, v, shown, powers)

      times = size.keys // n
      start = steps.start(rows, pl.next_power_of_2(Hv))
      result, *sums = steps.finish(*lax.fori_loop(low * times, high * times, tile, start))
      out[...] = result
      top[...], log_sum[...] = (line[:, 0] for line in sums)
      return steps.finite(result)

    good = put(size.keys, False)

    @pl.when(~good)
    def _():
      put(_PIECE, True)

  axes = {
    "p": (None, lambda p, m, b: p),
    "b": (None, lambda p, m, b: b),
    "n": (None, lambda p, m, b: m),
    "m": (None, lambda p, m, b: m),
  }
  operands = {
    "queries": (jax.tree.map(_plain, sight.queries), "bnq"),
    "keys": (jax.tree.map(_plain, sight.keys), "bnk"),
    "query": (jnp.swapaxes(query, 1, 2), "bmqh"),
    "key": (key, "bkmh"),
    "value": (value, "bkmh"),
    "cap": (None if cap is None else cap.reshape(1, 1), ".."),
  }
  line = (splits, B, K, rows)
  wide = (*line, pl.next_power_of_2(Hv))
  results = (("pbmqh", wide, jnp.float32), *(("pbmq", line, jnp.float32),) * 2)
  return _call(settings, kernel, Place((splits, K, B), axes), operands, results)


def _joined(
  settings: Settings, parts: tuple[Array, ...], query: Array, width: int, powers: steps.Powers
) -> tuple[Array, ...]:
  """Output [B, K, T, Hv] and log-sum-exp, maximum, log₂ of the sum [B, K, T]."""
  B, T, K, _ = query.shape
  splits = settings.splits

  def kernel(x, out, lse, top, log_sum):
    part = lax.iota(jnp.int32, pl.next_power_of_2(splits))
    there = part < splits
    tops = plgpu.load(x.top.at[part], mask=there, other=-jnp.inf)
    sums = plgpu.load(x.log_sum.at[part], mask=there, other=0.0)
    outs = _load(x.out, part, width, there)
    most = tops.max(0)
    none = most == -jnp.inf
    sums = jnp.exp2((tops - jnp.where(none, 0.0, most)) * powers.outer + sums)
    sums = jnp.where(tops == -jnp.inf, 0.0, sums)
    total = jnp.where(none, 1.0, sums.sum(0))
    joined = (outs * (sums / total)[:, None]).sum(0)
    column = lax.iota(jnp.int32, len(joined))
    plgpu.store(out.at[column], joined.astype(out.dtype), mask=column < width)
    top[...], log_sum[...] = most, jnp.log2(total)
    lse[...] = most * (powers.outer / steps.LOG2E) + jnp.log2(total) * math.log(2)

  axes = {
    "b": (None, lambda r, m, b: b),
    "m": (None, lambda r, m, b: m),
    "q": (None, lambda r, m, b: r),
  }
  names = ("out", "top", "log_sum")
  kinds = ("pbmqh", "pbmq", "pbmq")
  operands = dict(zip(names, zip(parts, kinds, strict=True), strict=True))
  lines = (("bmq", (B, K, T), jnp.float32),) * 3
  results = (("bmqh", (B, K, T, width), query.dtype), *lines)
  return _call(settings, kernel, Place((T, K, B), axes), operands, results)


def _call(
  settings: Settings,
  kernel: Callable[..., None],
  place: Place,
  operands: dict[str, tuple[Any, str]],
  results: tuple[tuple[str, tuple[int, ...], Any], ...],
) -> tuple[Array, ...]:
  """Runs `kernel(operands, *results)`; an operand comes with the kinds of its axes."""
  size = settings.sizes.forward
  arrays = {name: x for name, (x, _) in operands.items()}
  specs = {
    name: jax.tree.map(lambda x, kinds=kinds: place.spec(x.shape, kinds), tree)
    for name, (tree, kinds) in operands.items()
  }
  call = pl.pallas_call(
    lambda refs, *outputs: kernel(SimpleNamespace(**refs), *outputs),
    grid=place.grid,
    in_specs=[specs],
    out_specs=[place.spec(shape, kinds) for kinds, shape, _ in results],
    out_shape=[settings.result(shape, dtype, arrays) for _, shape, dtype in results],
    name=kernel.__qualname__.split(".")[0].lstrip("_"),
    compiler_params=plgpu.CompilerParams(num_warps=size.warps, num_stages=size.stages),
    interpret=settings.interpret,
  )
  return settings.run(call, arrays)


def _load(ref: Any, at: Array, width: int, inside: Array | None = None) -> Array:
  """Rows `at` of a ref [length, width], zeros up to the next power of two and where not inside."""
  column = lax.iota(jnp.int32, pl.next_power_of_2(width))
  there = [] if inside is None else [inside[:, None]]
  if len(column) > width:
    there.append(column[None] < width)
  place = ref.at[at[:, None], column[None]]
  if not there:
    return plgpu.load(place)
  mask = functools.reduce(jnp.logical_and, there)
  return plgpu.load(place, mask=jnp.broadcast_to(mask, (len(at), len(column))), other=0.0)


def _rows(T: int) -> int:
  return max(_PIECE, pl.next_power_of_2(T))


def _plain(x: Any) -> Array:
  """As int32 or float32, which kernels take."""
  return jnp.asarray(x, jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)


def _flags(sight: Sight) -> Callable[..., Any]:
  """Gives parts of `_plain` queries and keys their types back."""
  tree = sight.queries, sight.keys
  flags = jax.tree.map(lambda x: jnp.dtype(x.dtype) == jnp.bool_, tree)
  return lambda *parts: jax.tree.map(lambda flag, x: x != 0 if flag else x, flags, parts)
