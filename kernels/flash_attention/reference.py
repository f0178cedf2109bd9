"""Attention written out: the T × S matrix of scores, in the precision of its arguments.

What every other implementation is compared with (on float64 arrays, under `jax.enable_x64`), and
the fastest choice for a few queries.
"""

from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import numerics
from effjax.core.typing import Array, Bool, Dim, Float, Int
from effjax.kernels.flash_attention import shown
from effjax.kernels.flash_attention.tile_map.terms import Terms


def attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  *,
  mask: Any,
  scale: float,
  logit_softcap: float | Float[Array, ""] | None = None,
  bias: Float[Array, "#B #N #T #S"] | None = None,
  scores: Any = None,
  segment_ids: tuple[Int[Array, "#B T"], Int[Array, "#B S"]] | None = None,
  query_positions: Int[Array, "#B T"] | None = None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
  """softmax(softcap(scale·QKᵀ) + bias + scores)V over the keys the mask shows, with its LSE."""
  B, T, N, _ = query.shape
  S, K = key.shape[1:3]
  wide = numerics.wide(query.dtype)
  whole, grouped = (B, N, T, S), (B, K, N // K, T, S)
  seen = _seen(T, S, mask, segment_ids, query_positions)
  added = [] if bias is None else [bias.astype(wide)]
  for each in added:
    seen = seen & (each != -jnp.inf)
  if scores is not None:
    terms: Any = Terms.of(scores, None, T, S, query_positions, wide)
    added.append(terms.dense(query_positions, seen).astype(wide))
    seen = seen & (added[-1] != -jnp.inf)
  seen = jnp.broadcast_to(seen, whole).reshape(grouped)
  products = shown.pairs(query.reshape(B, T, K, N // K, -1), key, seen).reshape(whole)
  logits = numerics.softcap(products * scale, logit_softcap)
  for each in added:
    logits = logits + each
  weights, lse = _softmax(jnp.where(seen.reshape(whole), logits, -jnp.inf))
  out = shown.rows(weights.reshape(grouped).astype(value.dtype), value, seen)
  return out.reshape(B, T, N, -1).astype(query.dtype), jnp.swapaxes(lse, 1, 2)


def _seen(T: Dim, S: Dim, mask: Any, segment_ids: Any, positions: Any) -> Bool[Array, "b n T S"]:
  seen = numerics.expand(mask.dense(T, S, positions), 4)
  if segment_ids is not None:
    q_ids, k_ids = segment_ids[0][:, None, :, None], segment_ids[1][:, None, None, :]
    seen = seen & (q_ids == k_ids) & (q_ids >= 0)
  return seen


def _softmax(scores: Float[Array, "B N T S"]) -> tuple[Array, Array]:
  """Weights and log-sum-exp over the last axis; zeros and −inf for a row of −inf."""
  top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
  top = jnp.where(jnp.isfinite(top), top, 0)
  weights = jnp.exp(scores - top)
  total = weights.sum(axis=-1, keepdims=True)
  none = total == 0
  safe = jnp.where(none, 1, total)
  lse = jnp.where(none, -jnp.inf, top + jnp.log(safe))
  return weights / safe, lse[..., 0]
