"""Attention written out: the T × S matrix of scores, in the precision of its arguments.

What every other implementation is compared with (give it float64 arrays under `jax.enable_x64`), and
the fastest choice for a few queries.
"""

import jax
import jax.numpy as jnp

from effjax.core.typing import Array, Float


def attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  *,
  mask=None,
  scale: float,
  logit_softcap: float | None = None,
  bias: Float[Array, "#B #N #T #S"] | None = None,
  q_index=None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
  """softmax(softcap(scale·QKᵀ) + bias)V over the keys the mask lets through, and its log-sum-exp."""
  B, T, N, _ = query.shape
  S, K = key.shape[1:3]
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  grouped = query.reshape(B, T, K, N // K, -1)
  scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=dtype)
  scores = scores.reshape(B, N, T, S) * scale
  if logit_softcap is not None:
    scores = logit_softcap * jnp.tanh(scores / logit_softcap)
  if bias is not None:
    scores = scores + bias.astype(dtype)
  if mask is not None:
    if q_index is None:
      q_index = jnp.arange(S - T, S)[None, None, :, None]
    seen = mask.predicate(q_index, jnp.arange(S)[None, None, None, :])
    scores = jnp.where(seen, scores, -jnp.inf)
  top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf))
  top = jnp.where(jnp.isfinite(top), top, 0.0)
  weights = jnp.exp(scores - top)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  some = total > 0
  safe = jnp.where(some, total, 1.0)
  lse = jnp.where(some, top + jnp.log(safe), -jnp.inf)[..., 0]
  weights = (weights / safe).reshape(B, K, N // K, T, S).astype(value.dtype)
  out = jnp.einsum("bkgts,bskh->btkgh", weights, value, preferred_element_type=dtype)
  return out.reshape(B, T, N, -1).astype(query.dtype), jnp.swapaxes(lse, 1, 2)
