"""The frame of fused attention: all that is the same on every platform around its kernels.

Forward, by rows of tiles: O and LSE. Backward, by rows: dQ; by columns: dK and dV; and the gradient
of the bias, whose size is T × S in any case. The backward kernels compute P = exp(S − LSE) again
from the inputs and LSE alone, with D = rowsum(dO∘O) − dLSE.

Reference: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import numerics
from effjax.core.typing import Array, Float, Int
from effjax.kernels.flash_attention.fused import steps
from effjax.kernels.flash_attention.fused.jobs import Job, Kernels, Settings
from effjax.kernels.flash_attention.fused.sizes import Sizes, choose
from effjax.kernels.flash_attention.tile_map.sight import Where

WIDEST = 256


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
  scores: Any = None,
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
  if scores is not None or isinstance(logit_softcap, jax.Array):
    raise NotImplementedError("fused kernels take no scores and no traced logit_softcap")
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
  job = Job.of(settings, settings.sizes.forward, query, key, value, bias, where)
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
  job = functools.partial(Job.of, settings, d_out=d_out, lse=lse, delta=delta)
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
