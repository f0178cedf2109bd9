"""Attention by fused kernels: all that is the same on every platform around them.

A platform gives four kernels. Forward, by rows of tiles: O and LSE. Backward, by rows: dQ; by
columns: dK and dV; and the gradient of the bias, whose size is T × S in any case. The backward
kernels compute P = exp(S − LSE) again from the inputs and LSE alone, with D = rowsum(dO∘O) − dLSE.

Reference: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import numerics
from effjax.core.typing import Array, Float, Int
from effjax.kernels.flash_attention.fused import steps
from effjax.kernels.flash_attention.fused.sizes import Size, Sizes, choose
from effjax.kernels.flash_attention.tile_map.blocks import TileList, tile_lists
from effjax.kernels.flash_attention.tile_map.sight import Sight, Where

WIDEST = 256


@dataclasses.dataclass(frozen=True)
class Kernels:
  """A platform's kernels; each takes a `Job` and returns padded arrays.

  Attributes:
    forward: out [P, B, T, N, Hv] and log-sum-exp [P, B, N, T] of P parts of each row's tiles.
    queries: dQ [B, T, N, H].
    keys: dK [B, S, K, H] and dV [B, S, K, Hv].
    bias: the bias's gradient, in its shape.
    platform: "gpu" or "tpu".
    width: the width that a head of a given one is padded to.
  """

  forward: Callable[["Job"], tuple[Array, Array]]
  queries: Callable[["Job"], Array]
  keys: Callable[["Job"], tuple[Array, Array]]
  bias: Callable[["Job"], Array]
  platform: str
  width: Callable[[int], int]


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is known of a call while tracing."""

  kernels: Kernels
  scale: float
  softcap: float | None
  sizes: Sizes
  splits: int
  interpret: bool


@dataclasses.dataclass(frozen=True)
class Job:
  """What a kernel works on: arrays padded to whole tiles, and what goes on in each tile.

  Attributes:
    size: of its tiles.
    lists: the tiles of each row (or column) of tiles.
    any_full, any_partial: False where it is known that the lists hold no such tile.
    seen: booleans of a tile from its parts of `queries` and `keys` and the positions of its keys.
    queries, keys: pytrees of integers [b, h, length], see `Sight`.
    query … bias: [B, T, N, H], [B, S, K, H], [B, S, K, Hv], [b, n, T, S].
    d_out, lse, delta: backward only: [B, T, N, Hv], and [B, N, T] with LSE in units of log 2.
  """

  settings: Settings
  size: Size
  lists: TileList
  any_full: bool
  any_partial: bool
  seen: Callable[[Any, Any, Array], Array]
  queries: Any
  keys: Any
  query: Array
  key: Array
  value: Array
  bias: Array | None
  d_out: Array | None = None
  lse: Array | None = None
  delta: Array | None = None

  @property
  def group(self) -> int:
    """Query heads of a key-value head."""
    return self.query.shape[2] // self.key.shape[2]

  @property
  def tiles(self) -> tuple[int, int]:
    """Number of query tiles and of key tiles."""
    return self.query.shape[1] // self.size.queries, self.key.shape[1] // self.size.keys

  def scores(self, a: Array, b: Array, bias: Array | None, seen: Array | None):
    """Those of a tile, see `steps.scores`."""
    return steps.scores(a, b, bias, seen, self.settings.scale, self.settings.softcap)

  def result(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A result that varies over the mesh axes that the arguments vary over."""
    kind = jax.typeof(self.query).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def refusal(query: Array, value: Array) -> str | None:
  """Why fused kernels cannot take these arrays, or None."""
  width = max(query.shape[-1], value.shape[-1])
  if width > WIDEST:
    return f"head width {width}; fused kernels take up to {WIDEST}"
  if jnp.dtype(query.dtype).itemsize > 4:
    return f"type {query.dtype}; fused kernels take float32, bfloat16 and float16"
  return None


def attention(
  kernels: Kernels,
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  *,
  mask: Any,
  scale: float,
  logit_softcap: float | None = None,
  bias: Float[Array, "#B #N #T #S"] | None = None,
  segment_ids: tuple[Int[Array, "#B T"], Int[Array, "#B S"]] | None = None,
  query_positions: Int[Array, "#B T"] | None = None,
  sizes: Sizes | None = None,
  interpret: bool = False,
  splits: int = 1,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
  """Attention and its log-sum-exp, differentiable once, with a platform's kernels.

  Args:
    splits: parts in which the tiles of a row are worked on at the same time.

  Raises:
    ValueError: for heads wider than `WIDEST`, or types other than float32, bfloat16 and float16.
  """
  T, S = query.shape[1], key.shape[1]
  refused = refusal(query, value)
  if refused:
    raise ValueError(refused)
  sizes = sizes or choose(
    kernels.platform, query.dtype, max(query.shape[-1], value.shape[-1]), T, S
  )
  if bias is not None and bias.shape[2:] != (T, S):
    # In float32, so that the gradient of what is shared is not rounded before it is summed.
    bias = jnp.broadcast_to(bias.astype(jnp.float32), (*bias.shape[:2], T, S))
  settings = Settings(kernels, float(scale), logit_softcap, sizes, splits, interpret)
  operands = (query, key, value, bias, Where(mask, segment_ids, query_positions))
  return _attention(settings, *numerics.vary_alike(operands, operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, query, key, value, bias, where):
  return _forward(settings, query, key, value, bias, where)


def _attention_fwd(settings, query, key, value, bias, where):
  out, lse = _forward(settings, query, key, value, bias, where)
  return (out, lse), (query, key, value, bias, where, out, lse)


def _forward(settings, query, key, value, bias, where):
  job = _job(settings, settings.sizes.forward, query, key, value, bias, where)
  out, lse = settings.kernels.forward(job)
  T = query.shape[1]
  out, lse = out[..., :T, :, : value.shape[-1]], jnp.swapaxes(lse, 2, 3)[:, :, :T]
  return (out[0], lse[0]) if settings.splits == 1 else _joined(out, lse, query.dtype)


def _joined(out: Array, lse: Array, dtype: Any) -> tuple[Array, Array]:
  """Attention from its parts over disjoint keys, along the first axis."""
  whole = jax.nn.logsumexp(lse, axis=0)
  share = jnp.exp(lse - jnp.where(whole > -jnp.inf, whole, 0.0)[None])
  return jnp.sum(out * share[..., None], axis=0).astype(dtype), whole


def _backward(settings, saved, cotangents):
  query, key, value, bias, where, out, lse = saved
  d_out, d_lse = cotangents
  some = lse > -jnp.inf
  delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1) - d_lse
  delta = jnp.where(some, delta, 0.0)
  # Rows with nothing to attend to, padded ones among them: 2^(score − large) = 0.
  lse = jnp.where(some, lse * steps.LOG2E, -steps.FLOOR)
  job = functools.partial(_job, settings, d_out=d_out, lse=lse, delta=delta)
  arguments = (query, key, value, bias, where)
  kernels, sizes = settings.kernels, settings.sizes
  like = lambda x, whole: x[:, : whole.shape[1], :, : whole.shape[3]]
  d_query = like(kernels.queries(job(sizes.queries, *arguments)), query)
  d_key, d_value = kernels.keys(job(sizes.keys, *arguments, by_columns=True))
  d_bias = None
  if bias is not None:
    size = sizes.bias or sizes.queries
    d_bias = kernels.bias(job(size, *arguments))[:, :, : bias.shape[2], : bias.shape[3]]
  return d_query, like(d_key, key), like(d_value, value), d_bias, None


_attention.defvjp(_attention_fwd, _backward)


def _job(
  settings,
  size,
  query,
  key,
  value,
  bias,
  where,
  *,
  d_out=None,
  lse=None,
  delta=None,
  by_columns=False,
) -> Job:
  T, S = query.shape[1], key.shape[1]
  rows, columns = -(-T // size.queries), -(-S // size.keys)
  long, wide = rows * size.queries, columns * size.keys
  sight = Sight.of(where, T, S, size.queries, size.keys)
  lists = tile_lists(sight, rows, columns, by_columns=by_columns)
  queries, read_queries = _integers(sight.queries, T, long)
  keys, read_keys = _integers(sight.keys, S, wide)
  head = lambda x, length: _padded(x, length, settings.kernels.width(x.shape[-1]))
  line = lambda x, fill: jnp.pad(
    jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, long - T)), constant_values=fill
  )
  any_full, any_partial = lists.kinds
  return Job(
    settings=settings,
    size=size,
    lists=lists,
    any_full=any_full,
    any_partial=any_partial,
    seen=lambda q, k, at: sight.seen(read_queries(q), read_keys(k), at),
    queries=queries,
    keys=keys,
    query=head(query, long),
    key=head(key, wide),
    value=head(value, wide),
    bias=bias if bias is None else jnp.pad(bias, ((0, 0), (0, 0), (0, long - T), (0, wide - S))),
    d_out=d_out if d_out is None else head(d_out, long),
    lse=lse if lse is None else line(lse, -steps.FLOOR),
    delta=delta if delta is None else line(delta, 0),
  )


def _integers(tree: Any, length: int, padded: int) -> tuple[Any, Callable[[Any], Any]]:
  """The arrays as int32 [b, h, padded], and a function that gives tiles of them their types."""
  flags = jax.tree.map(lambda x: jnp.dtype(x.dtype) == jnp.bool_, tree)

  def whole(x: Any) -> Array:
    x = jnp.broadcast_to(x, (*x.shape[:2], length)).astype(jnp.int32)
    return jnp.pad(x, ((0, 0), (0, 0), (0, padded - length)), mode="edge")

  read = lambda tiles: jax.tree.map(lambda flag, x: x != 0 if flag else x, flags, tiles)
  return jax.tree.map(whole, tree), read


def _padded(x: Array, length: int, width: int) -> Array:
  """[B, L, heads, X] with zeros up to `length` and `width`."""
  return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, width - x.shape[3])))
