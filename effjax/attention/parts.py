"""Attention over parts of the keys, joined by their log-sum-exps.

Softmax over two sets of keys gives each set the share e^LSE of the whole, so what every
implementation returns is enough to join them, exactly and differentiably. Online softmax, Milakov
and Gimelshein, arXiv 1805.02867, section 3.1; of blocks, FlashAttention-2, arXiv 2307.08691,
section 2.3.
"""

import jax
import jax.numpy as jnp

from effjax.core.typing import Array, Float

Part = tuple[Float[Array, "... _"], Float[Array, "..."]]  # out and log-sum-exp


def join(a: Part, b: Part) -> Part:
  """Attention over the keys of both parts.

  A part without keys is zeros with a log-sum-exp of −inf; joined with another it gives that one.
  The log-sum-exps broadcast against each other; out keeps the type of `a`.

  Example:
    >>> seen = jnp.full((1, 2), 3.0), jnp.zeros(1)
    >>> out, lse = join(seen, (jnp.full((1, 2), 5.0), jnp.zeros(1)))
    >>> out.tolist(), round(float(lse[0]), 4)
    ([[4.0, 4.0]], 0.6931)
  """
  (a_out, a_lse), (b_out, b_lse) = a, b
  some = (a_lse > -jnp.inf) | (b_lse > -jnp.inf)
  a_lse, b_lse = (jnp.where(some, lse, 0.0) for lse in (a_lse, b_lse))
  share = lambda out, gap: out.astype(gap.dtype) * jax.nn.sigmoid(gap)[..., None]
  out = share(a_out, a_lse - b_lse) + share(b_out, b_lse - a_lse)
  return out.astype(a_out.dtype), jnp.where(some, jnp.logaddexp(a_lse, b_lse), -jnp.inf)


def add_sinks(part: Part, sinks: Float[Array, "..."]) -> Part:
  """Attention that also sees, for each query, a key of score `sinks` whose value is zero.

  `sinks` broadcasts against the log-sum-exp. A query that saw nothing still gives zeros; its
  log-sum-exp is the sink.
  """
  out, lse = part
  return join(part, (jnp.zeros((1,) * out.ndim, out.dtype), sinks.astype(lse.dtype)))
