"""The frame of fused attention: all that is the same on every platform around its kernels.

Forward, by rows of tiles: O and LSE. Backward, by rows: dQ; by columns: dK and dV, and dQ too where
a kernel can sum it up on the way; and the gradient of the bias, whose size is T × S in any case.
The backward kernels compute P = exp(S − LSE) again from the inputs and LSE alone, with
D = rowsum(dO∘O) − dLSE; LSE is kept as a row's greatest score and the logarithm of a sum, since
scores near −3e38 leave no digits of that.

Reference: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import numerics
from effjax.core.linear_map import linear_map
from effjax.core.typing import Array, Float, Int, PyTree
from effjax.kernels.flash_attention.fused import steps
from effjax.kernels.flash_attention.fused.jobs import NOTHING, Job, Kernels, Settings
from effjax.kernels.flash_attention.fused.sizes import Sizes, choose
from effjax.kernels.flash_attention.tile_map.partly import Partly
from effjax.kernels.flash_attention.tile_map.sight import Where
from effjax.kernels.flash_attention.tile_map.terms import Terms
from effjax.kernels.flash_attention.tiled import xla

WIDEST = 256
_MOST = 2.0**11  # from where on float32 has too few digits for a log-sum-exp


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
  logit_softcap: float | Float[Array, ""] | None = None,
  bias: Float[Array, "#B #N #T #S"] | None = None,
  scores: Any = None,
  segment_ids: tuple[Int[Array, "#B #T"], Int[Array, "#B S"]] | None = None,
  query_positions: Int[Array, "#B #T"] | None = None,
  sizes: Sizes | None = None,
  interpret: Any = False,
  splits: int = 1,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
  """Attention and its log-sum-exp, differentiable once, with a platform's kernels.

  Args:
    segment_ids, query_positions: of each query, or one for all.
    splits: parts in which the tiles of a row are worked on at the same time.

  Raises:
    ValueError: for heads wider than `WIDEST`, or types other than float32, bfloat16 and float16.
  """
  T, S = query.shape[1], key.shape[1]
  refused = refusal(query, value)
  if refused:
    raise ValueError(refused)
  terms = Terms.of(scores, logit_softcap, T, S, query_positions, jnp.float32)
  refused = kernels.refusal(terms)
  if refused:
    raise ValueError(refused)
  sizes = sizes or choose(
    kernels.platform, query.dtype, max(query.shape[-1], value.shape[-1]), T, S, mask=mask
  )
  if bias is not None and bias.shape[2:] != (T, S):
    # In float32, so that the gradient of what is shared is not rounded before it is summed.
    bias = jnp.broadcast_to(bias.astype(jnp.float32), (*bias.shape[:2], T, S))
  softcap = None if isinstance(logit_softcap, jax.Array) else logit_softcap
  settings = Settings(kernels, float(scale), softcap, sizes, splits, interpret)
  where = Partly.of(Where(mask, segment_ids, query_positions))
  operands = (query, key, value, bias, where, terms)
  operands = _narrow(numerics.vary_alike(operands, operands))
  with jax.enable_x64(False):
    return _attention(settings, *operands)


def _narrow(tree: PyTree) -> PyTree:
  """Numbers of 64 bits, which kernels do not have, in 32."""
  kinds = {jnp.dtype("int64"): jnp.int32, jnp.dtype("float64"): jnp.float32}
  return jax.tree.map(lambda x: x.astype(kinds.get(jnp.dtype(x.dtype), x.dtype)), tree)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attention(settings, *operands):
  return _forward(settings, *operands)[:2]


@_attention.defjvp
def _attention_jvp(settings, operands, tangents):
  with jax.enable_x64(False):
    out, lse, *parts = _forward(settings, *operands)
    moves = *tangents[:4], [] if tangents[5] is None else tangents[5].trained
    back = functools.partial(_backward, settings)
    saved = (*operands, out, lse, *parts)
    return (out, lse), linear_map(no_tangents, back, saved, moves, (out, lse))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forward(settings, query, key, value, bias, where, terms):
  """Output, log-sum-exp, and its two parts in the unit of the tops and of log 2."""
  if settings.kernels.few is not None:
    return settings.kernels.few(settings, query, key, value, where.tree, terms)
  job = Job.of(settings, settings.sizes.forward, query, key, value, bias, where, terms)
  T = query.shape[1]
  out, *lines = settings.kernels.forward(job)
  out = out[:, :T, :, : value.shape[-1]]
  top, log_sum = (jnp.swapaxes(x, 1, 2)[:, :T] for x in lines)
  lse = top * (job.powers.outer / steps.LOG2E) + log_sum * math.log(2)
  return out, lse, top, log_sum


def _backward(settings, saved, cotangents):
  with jax.enable_x64(False):
    terms = _term_gradients(settings, saved, cotangents)
    return *_gradients(settings, saved, cotangents), terms


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradients(settings, saved, cotangents):
  """Those of query, key, value and bias."""
  query, key, value, bias, where, terms, out, _, top, log_sum = saved
  d_out, d_lse = cotangents
  delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1) - d_lse
  adds = bias is not None or (terms is not None and terms.structure is not None)
  powers = settings.powers(adds, terms is not None and terms.softcap is not None)
  lse = top * powers.outer + log_sum
  lse = jnp.where(jnp.abs(lse) < _MOST, lse, jnp.nan)
  lines = {"top": top, "log_sum": log_sum, "lse": lse, "delta": delta}
  none = top == -jnp.inf
  lines = {name: jnp.where(none, NOTHING[name], x) for name, x in lines.items()}
  job = functools.partial(Job.of, settings, d_out=d_out, lines=lines)
  arguments = (query, key, value, bias, where, terms)
  kernels, sizes = settings.kernels, settings.sizes
  like = lambda x, whole: x[:, : whole.shape[1], :, : whole.shape[3]]
  found = kernels.keys(job(sizes.keys, *arguments, by_columns=True))
  if kernels.queries is not None:
    found = *found, kernels.queries(job(sizes.queries, *arguments))
  d_key, d_value, d_query = (like(x, y) for x, y in zip(found, (key, value, query), strict=True))
  d_bias = None
  if bias is not None:
    size = sizes.bias or sizes.queries
    d_bias = kernels.bias(job(size, *arguments))[:, :, : bias.shape[2], : bias.shape[3]]
  return d_query, d_key, d_value, d_bias


def _term_gradients(settings, saved, cotangents):
  """Those of what trains in the terms, by tiles in XLA: sums that kernels do not share."""
  *arrays, where, terms, out, lse, top, log_sum = saved
  if terms is None or not terms.trained:
    return []
  rest = log_sum * math.log(2) - (lse - top)
  results = out, lse, jnp.where(lse == -jnp.inf, 0.0, rest)
  options = {"scale": settings.scale, "logit_softcap": settings.softcap}
  return xla.term_gradients(*arrays, where.tree, terms, results, cotangents, **options)


def no_tangents(*_):
  """The derivative of what has none."""
  raise NotImplementedError(
    "fused attention kernels have first derivatives in reverse mode alone; implementation='xla' "
    "has those in forward mode too, and forward mode over both; 'reference' has all"
  )


for _function in (_forward, _gradients):
  _function.defjvp(no_tangents)
