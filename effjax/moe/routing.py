"""Which experts each token visits, and with what weight.

A router gives logits [..., E]; a routing function turns them into a `Routing`, which is all that
dispatch and the balance losses look at. Softmax top-k gating: Shazeer et al., arXiv 1701.06538,
section 2.1, without the noise; with the gates renormalised over the chosen experts it is that of
Mixtral (arXiv 2401.04088, section 2.1).
"""

import jax
import jax.numpy as jnp
from flax import struct

from effjax.core.typing import Array, Float, Int


@struct.dataclass
class Routing:
  """A decision for each token; leading axes are those of the tokens.

  Attributes:
    experts: [..., k], the chosen experts, best first.
    gates: [..., k], float32, what each chosen expert's output is multiplied by.
    probs: [..., E], float32, the softmax over all experts.
    logits: [..., E], float32, what `probs` is the softmax of.
  """

  experts: Int[Array, "... k"]
  gates: Float[Array, "... k"]
  probs: Float[Array, "... E"]
  logits: Float[Array, "... E"]


def top_k_routing(logits: Float[Array, "... E"], *, k: int, renormalize: bool = True) -> Routing:
  """Each token to its k most probable experts.

  p = softmax(logits) in float32; the gates are the k largest p, divided by their sum when
  `renormalize`. Of equal probabilities the lower expert wins.

  Args:
    logits: the router's output.
    k: experts a token visits, 1 … E.
    renormalize: whether a token's gates sum to one. Note that with k = 1 they are then constant,
      and the router learns from the balance losses alone.

  Raises:
    ValueError: when k is out of range.

  Example:
    >>> routing = top_k_routing(jnp.log(jnp.array([[0.1, 0.6, 0.3]])), k=2)
    >>> routing.experts.tolist(), [round(float(g), 3) for g in routing.gates[0]]
    ([[1, 2]], [0.667, 0.333])
  """
  if not 1 <= k <= logits.shape[-1]:
    raise ValueError(f"top_k_routing: k={k}; allowed: 1 … {logits.shape[-1]} experts")
  logits = logits.astype(jnp.float32)
  probs = jax.nn.softmax(logits, axis=-1)
  gates, experts = jax.lax.top_k(probs, k)
  if renormalize:
    gates = gates / gates.sum(axis=-1, keepdims=True)
  return Routing(experts, gates, probs, logits)
