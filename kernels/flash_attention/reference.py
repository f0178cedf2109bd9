"""Attention written out: the T × S matrix of scores, in the precision of its arguments.

What every other implementation is compared with (on float64 arrays, under `jax.enable_x64`), and
the fastest choice for a few queries.
"""

from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import numerics
from effjax.core.typing import Array, Bool, Float, Int
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
  wide = jnp.promote_types(query.dtype, jnp.float32)
  grouped = query.reshape(B, T, K, N // K, -1)
  products = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=wide)
  logits = numerics.softcap(products.reshape(B, N, T, S) * scale, logit_softcap)
  if bias is not None:
    logits = logits + bias.astype(wide)
  if scores is not None:
    terms = Terms.of(scores, None, T, S, query_positions, wide)
    logits = logits + terms.dense(query_positions).astype(wide)
  logits = jnp.where(_seen(T, S, mask, segment_ids, query_positions), logits, -jnp.inf)
  weights, lse = _softmax(logits)
  weights = weights.reshape(B, K, N // K, T, S).astype(value.dtype)
  out = jnp.einsum("bkgts,bskh->btkgh", weights, value, preferred_element_type=wide)
  return out.reshape(B, T, N, -1).astype(query.dtype), jnp.swapaxes(lse, 1, 2)


def _seen(T: int, S: int, mask: Any, segment_ids: Any, positions: Any) -> Bool[Array, "b n T S"]:
  seen = numerics.expand(mask.dense(T, S, positions), 4)
  if segment_ids is not None:
    q_ids, k_ids = segment_ids[0][:, None, :, None], segment_ids[1][:, None, None, :]
    seen = seen & (q_ids == k_ids) & (q_ids >= 0)
  return seen


def _softmax(scores: Float[Array, "B N T S"]) -> tuple[Array, Array]:
  """Weights and log-sum-exp over the last axis; zeros and −inf for a row of −inf."""
  top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
  top = jnp.where(jnp.isfinite(top), top, 0.0)
  weights = jnp.exp(scores - top)
  total = weights.sum(axis=-1, keepdims=True)
  some = total > 0
  safe = jnp.where(some, total, 1.0)
  lse = jnp.where(some, top + jnp.log(safe), -jnp.inf)
  return weights / safe, lse[..., 0]
