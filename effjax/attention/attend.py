"""Attention on arrays: the one entry through which every module attends."""

import functools
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.attention import masks, parts
from effjax.attention import scores as score_values
from effjax.attention.masks.base import FAR, of_queries
from effjax.core import known, numerics, spmd
from effjax.core.typing import Array, Dim, Float, Int
from effjax.kernels.flash_attention import reference
from effjax.kernels.flash_attention.fused import cudnn, frame, gpu, tpu
from effjax.kernels.flash_attention.tiled import xla

_FEW = 16  # fewer queries than this, as in decoding, are not worth laying the keys out for
_EVERYWHERE: dict[str, Callable] = {
  "reference": reference.attention,
  "xla": xla.attention,
  "interpret": functools.partial(gpu.attention, interpret=True),
}
# Beside them those of a device, the best first.
_DEVICES: dict[str, dict[str, Callable]] = {
  "gpu": {"cudnn": cudnn.attention, "gpu": gpu.attention},
  "tpu": {"tpu": tpu.attention},
}
_KNOWN = (*_EVERYWHERE, *(name for ready in _DEVICES.values() for name in ready))


@spmd.on_any_mesh
@typing.no_type_check  # the checks below name what is wrong
def attend(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  *,
  mask: masks.Mask | None = None,
  scale: float | Float[Array, "#N"] | None = None,
  logit_softcap: float | Float[Array, ""] | None = None,
  bias: Float[Array, "#B #N #T #S"] | None = None,
  scores: score_values.Score | None = None,
  segment_ids: Int[Array, "B S"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
  query_positions: Int[Array, "B T"] | None = None,
  sinks: Float[Array, "N"] | None = None,
  return_lse: bool = False,
  implementation: str | None = None,
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
  """softmax(softcap(scale · query keyᵀ) + bias + scores) value, over the keys each query may see.

  Query head n uses key-value head n // (N / K). Keys and values are taken in the type of query,
  which is that of the result. A query that may see nothing gives zeros, a log-sum-exp of −inf and
  no gradients. All implementations honour all arguments or raise.

  Args:
    mask: who sees whom (`effjax.attention.masks`); None is everyone.
    scale: factor on the scores, H^−½ when None, or one for each head; a traced one trains.
    logit_softcap: c > 0 in c · tanh(score / c), before bias and mask; a traced one trains.
    bias: added to the scores; each axis is full or 1. It may hold −inf.
    scores: what is added to them as a function of positions and small arrays, which train
      (`effjax.attention.scores`).
    segment_ids: [B, S] for a sequence whose last T tokens ask, or a pair for queries and keys:
      equal ids see each other within the mask; a negative id is padding and sees nothing.
    query_positions: absolute position of each query among the keys' slots 0 … S − 1, as decoding
      against a cache needs; the last T positions when None. What masks or segment ids say of
      single tokens is not true of any other.
    sinks: for each query head the score of one more key, which all see and whose value is zero. A
      query that may see nothing then has a log-sum-exp of the sink.
    return_lse: also return the log-sum-exp of each query's scores, [B, T, N], differentiable.
    implementation: "reference" (holds T × S scores), "xla" (tiles; linear memory), "gpu" or "tpu"
      (fused kernels), "cudnn" (the GPU kernel instead, with a reason that is logged once, where
      cuDNN cannot honour an argument), "interpret" (the GPU kernel, run slowly on any device), or
      None to pick: "cudnn" on a GPU. XLA cannot split a fused kernel over devices: on several, None
      picks one in a `shard_map` only. Of sizes that `jax.export` has a symbol for, "xla" takes the
      batch's and "reference" all.

  Raises:
    ValueError: shapes that do not fit, or an implementation that is not available here.

  Example:
    >>> x = jnp.ones((1, 4, 2, 8))
    >>> attend(x, x, x, mask=masks.Causal()).shape
    (1, 4, 2, 8)

  Reference: FlashAttention (arXiv 2205.14135); grouped queries, arXiv 2305.13245; soft cap, Gemma 2
  (arXiv 2408.00118, section 2); sinks as a zero key and value, arXiv 2309.17453, section 3.3, here
  with a score of their own, as gpt-oss learns it.
  """
  mask = masks.Full() if mask is None else mask
  query, key, value, bias, sinks = arrays(query, key, value, bias, sinks)
  query_positions = places(query_positions)
  (B, T, N, _), S = query.shape, key.shape[1]
  check_places(B, T, S, N, mask, scores, query_positions)
  query, scale = scaled(query, scale)
  run = _pick(implementation, query, key, value, scores is not None and query_positions is not None)
  if run is cudnn.attention:
    run = functools.partial(run, return_lse=return_lse or sinks is not None)
  out, lse = run(
    query,
    key,
    value,
    mask=mask,
    scale=scale,
    logit_softcap=cap(logit_softcap),
    bias=bias,
    scores=scores,
    segment_ids=_id_pair(segment_ids, B, T, S, query_positions),
    query_positions=query_positions,
  )
  if sinks is not None:
    out, lse = parts.add_sinks((out, lse), sinks[None, None])
  return (out, lse) if return_lse else out


def _pick(
  implementation: str | None, query: Array, key: Array, value: Array, looks_up: bool
) -> Callable:
  """The implementation; `looks_up` says whether scores at positions are given, as no TPU has."""
  backend = jax.default_backend()
  ready, where = _ready(backend, query.shape[0], (query.shape[1], key.shape[1]))
  if implementation in ready:
    return ready[implementation]
  if implementation is not None:
    what = f"is not available {where}" if implementation in _KNOWN else "is unknown"
    names = ", ".join(map(repr, ready))
    raise ValueError(
      f"implementation={implementation!r} {what}; available: {names}, or None to pick"
    )
  if "xla" not in ready or (query.shape[1] < _FEW and backend != "gpu"):
    return reference.attention
  shared = jax.device_count() > 1 and not jax.typeof(query).manual_axis_type.varying
  refused = frame.refusal(query, value) or (looks_up and backend == "tpu")
  best = next(iter(_DEVICES.get(backend, {})), "xla")
  return xla.attention if shared or refused else ready[best]


def _ready(backend: str, batch: Dim, lengths: tuple[Dim, ...]) -> tuple[dict[str, Callable], str]:
  """What can be asked for, and where that is so. Of symbols for sizes tiles know the batch's."""
  able = _EVERYWHERE | _DEVICES.get(backend, {})
  if not known.is_size(*lengths):
    return {"reference": able["reference"]}, "for a length that is a symbol"
  if not known.is_size(batch):
    return {name: able[name] for name in ("reference", "xla")}, "for a batch that is a symbol"
  return able, f"on {backend}"


def arrays(query: Any, key: Any, value: Any, bias: Any, sinks: Any) -> tuple[Any, ...]:
  """The arrays of `attend` as JAX's, key and value in the type of query.

  Raises:
    ValueError: where they are no arrays, or do not fit one another.
  """
  given = {"query": query, "key": key, "value": value, "bias": bias, "sinks": sinks}
  for name, x in given.items():
    optional = name in ("bias", "sinks")
    if not (hasattr(x, "dtype") and hasattr(x, "ndim")) and not (optional and x is None):
      raise ValueError(f"{name} is {type(x).__name__}, expected an array")
  _check_arrays(query, key, value, bias, sinks)
  query, key, value, bias, sinks = (x if x is None else jnp.asarray(x) for x in given.values())
  return query, key.astype(query.dtype), value.astype(query.dtype), bias, sinks


def places(positions: Any) -> Array | None:
  """Positions of queries as int32; those far from any key no further than sums of them fit.

  Raises:
    ValueError: where they are no integers.
  """
  if positions is None:
    return None
  if not jnp.issubdtype(getattr(positions, "dtype", jnp.float32), jnp.integer):
    what = getattr(positions, "dtype", type(positions).__name__)
    raise ValueError(f"query_positions is of {what}, expected an array of integers")
  given = positions if isinstance(positions, np.ndarray) else jnp.asarray(positions)
  wide = given if given.dtype.itemsize > 4 else given.astype(np.int32)
  return jnp.asarray(wide.clip(-FAR // 2, FAR // 2), jnp.int32)


def _check_arrays(query: Any, key: Any, value: Any, bias: Any, sinks: Any) -> None:
  for name, x in (("query", query), ("key", key), ("value", value)):
    if x.ndim != 4 or 0 in x.shape:
      raise ValueError(
        f"{name} has shape {x.shape}, expected [batch, length, heads, width], none 0"
      )
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name} has type {x.dtype}, expected floating point")
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  if key.shape[0] != B or value.shape[0] != B:
    raise ValueError(f"batch: query has {B}, key {key.shape[0]}, value {value.shape[0]}")
  if key.shape[3] != H:
    raise ValueError(f"head width: query has {H}, key {key.shape[3]}")
  if value.shape[1:3] != (S, K):
    raise ValueError(
      f"value has [length, heads] {value.shape[1:3]}, expected those of key, {(S, K)}"
    )
  if N % K:
    raise ValueError(
      f"query has {N} heads, not a multiple of key's {K}; axes are [batch, length, heads, width]"
    )
  if bias is not None:
    whole = (B, N, T, S)
    if bias.ndim != 4 or any(n not in (1, w) for n, w in zip(bias.shape, whole, strict=True)):
      raise ValueError(f"bias has shape {bias.shape}, expected {whole} with any axis 1 instead")
    if not jnp.issubdtype(bias.dtype, jnp.floating):
      raise ValueError(
        f"bias has type {bias.dtype}, expected floating point: it is added to the scores; who sees "
        "whom is a mask=, or a bias of 0 and -inf"
      )
  if sinks is not None and (sinks.shape != (N,) or not jnp.issubdtype(sinks.dtype, jnp.floating)):
    raise ValueError(f"sinks has shape {sinks.shape} of {sinks.dtype}, expected {(N,)} of floats")


def check_places(B: Dim, T: Dim, S: Dim, N: int, mask: Any, scores: Any, positions: Any) -> None:
  """Raises ValueError where `mask`, `scores` or `positions` does not apply to these sizes."""
  if not isinstance(mask, masks.Mask):
    raise ValueError(
      f"mask is {type(mask).__name__}, expected a mask of effjax.attention.masks; "
      "booleans can be given as a bias of 0 and -inf, and scores as scores="
    )
  mask.check(B, T, S, positions is not None)
  if mask.heads not in (1, N):
    raise ValueError(f"mask: it tells {mask.heads} heads apart, and query has {N}")
  if scores is not None and not isinstance(scores, score_values.Score):
    raise ValueError(
      f"scores is {type(scores).__name__}, expected a score of effjax.attention.scores; "
      "an array can be given as a bias, and a mask as mask="
    )
  if scores is not None:
    scores.check(B, T, S, N)
  if positions is not None and (positions.ndim != 2 or positions.shape not in ((B, T), (1, T))):
    raise ValueError(f"query_positions has shape {positions.shape}, expected {(B, T)}")


def scaled(query: Array, scale: Any) -> tuple[Array, float]:
  """`query`, and the factor on its scores that is part of the program: an array is multiplied in.

  Raises:
    ValueError: a scale that is not finite where that is known, or of another shape.
  """
  N, H = query.shape[2:]
  scale = known.number("scale", H**-0.5 if scale is None else scale, shape=(N,))
  if isinstance(scale, int | float):
    return query, float(scale)
  wide = numerics.wide(query.dtype)
  factor = jnp.broadcast_to(jnp.asarray(scale, wide), (N,))[None, None, :, None]
  return (query.astype(wide) * factor).astype(query.dtype), 1.0


def cap(logit_softcap: Any) -> Any:
  """`logit_softcap` as a float where it is known, None and a traced one as they are.

  Raises:
    ValueError: one that is not above 0 and finite where that is known, or no number.
  """
  given = None if logit_softcap is None else known.number("logit_softcap", logit_softcap, above=0)
  return float(given) if isinstance(given, int | float) else given


def _id_pair(ids: Any, B: Dim, T: Dim, S: Dim, positions: Any) -> tuple[Array, Array] | None:
  """Segment ids of the queries [B, T] and of the keys [B, S]."""
  if ids is None:
    return None
  pair = ids if isinstance(ids, tuple | list) else (None, ids)
  if len(pair) != 2 or not all(x is None or hasattr(x, "dtype") for x in pair):
    raise ValueError("segment_ids: expected an integer array, or a pair of them (queries, keys)")
  q_ids, k_ids = pair
  for name, x, length in (("queries", q_ids, T), ("keys", k_ids, S)):
    if x is not None and (x.ndim != 2 or x.shape[0] not in (1, B) or x.shape[1] != length):
      raise ValueError(f"segment_ids of the {name} have shape {x.shape}, expected {(B, length)}")
    if x is not None and not jnp.issubdtype(x.dtype, jnp.integer):
      raise ValueError(f"segment_ids of the {name} have type {x.dtype}, expected integers")
    if x is not None:
      known.check_fits(f"segment_ids of the {name}", x)
  if k_ids is None:
    raise ValueError("segment_ids: the keys' are None; expected an array, or a pair of them")
  if q_ids is not None:
    return jnp.asarray(q_ids), jnp.asarray(k_ids)
  if known.more(T, S):
    raise ValueError(f"segment_ids: with {T} queries and {S} keys give a pair (queries, keys)")
  k_ids = jnp.asarray(k_ids)
  if positions is None:
    return k_ids[:, S - T :], k_ids
  return of_queries(k_ids, positions, -1), k_ids
