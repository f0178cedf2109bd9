"""Batch priority: where an expert is full, the tokens that are surest of it come first (V-MoE).

Riquelme et al., arXiv 2106.05974, section 4.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core.known import number
from effjax.core.typing import Array, Bool, Dim, Float, Int, Number, Size
from effjax.layers import Routing
from effjax.moe.losses import expert_shares, load_loss, variation
from effjax.moe.routers.capacity import Capacity, drop_overflow
from effjax.moe.routers.noisy import noisy
from effjax.moe.routers.top_k import TopK, top_k_routing


def batch_priority_routing(
  logits: Float[Array, "... M E"],
  *,
  k: Size,
  capacity: Dim,
  renormalize: bool = False,
  mask: Bool[Array, "..."] | None = None,
) -> Routing:
  """Each token to its k most probable experts, in the order of the largest probability.

  All first choices take their places before any second one, and among equal choices the tokens of
  the larger first probability before others. So later tokens displace earlier ones: it is for
  encoders.

  Args:
    logits: the router's output; leading axes are groups.
    k, renormalize: as in `top_k_routing`.
    capacity: rows C that an expert takes at most.
    mask: False for padding, which takes no room.

  Raises:
    ValueError: when k is out of range, or the capacity below 1.

  Example:
    >>> logits = jnp.log(jnp.array([[0.6, 0.4], [0.9, 0.1]]))
    >>> batch_priority_routing(logits, k=1, capacity=1).experts.tolist()
    [[2], [0]]
  """
  wanted = top_k_routing(logits, k=k, renormalize=renormalize)
  assert wanted.logits is not None
  priority = sureness(wanted.logits, wanted.experts)
  return drop_overflow(wanted, capacity, count=logits.shape[-1], mask=mask, priority=priority)


def sureness(logits: Float[Array, "... E"], experts: Int[Array, "... k"]) -> Float[Array, "..."]:
  """log p / (1 − p) of the first choice, which tells probabilities apart that float32 calls 1."""
  first = jax.nn.one_hot(experts[..., 0], logits.shape[-1], dtype=bool)
  best = jnp.where(first, logits, -jnp.inf).max(axis=-1)
  others = jax.nn.logsumexp(jnp.where(first, -jnp.inf, logits), axis=-1)
  return jax.lax.stop_gradient(best - others)


class BatchPriority(TopK):
  """A router: each token to k experts, by `batch_priority_routing`, with noise in training.

  H = x W + ε · noise / E with ε ~ N(0, 1), and the gates are the largest of softmax(H). Parameters,
  losses and metrics are those of `Scored`. It is refused in causal models, see `layers.peeking`.

  Attributes:
    top_k, renormalize, scale, limit: as in `TopK`.
    noise: standard deviation of the noise, times E.
    capacity: factors below 1 skip the tokens that matter least.
    importance: coefficient of CV² of the sums of softmax(x W).
    load: coefficient of `load_loss` by the estimator "v_moe".
  """

  peeks = encoder_only = True

  renormalize: bool | str = False
  _: dataclasses.KW_ONLY
  noise: Number = 1.0
  capacity: Capacity | None = Capacity(1.05, evaluation=1.05, multiple=4)
  load_balance: Number = 0.0
  z: Number = 0.0
  importance: Number = 0.005
  load: Number = 0.005

  def _choose(self, rows, logits, mask, key) -> Routing:
    noise = number("noise", self.noise, of="BatchPriority", least=0)
    routing: Any = self._best(noisy(logits, noise / self.experts, key))  # with logits
    counted = lambda: variation(expert_shares(routing.experts, self.experts, mask=mask))
    expected = lambda: load_loss(
      logits, routing.logits, noise / self.experts, k=self.top_k, mask=mask, estimator="v_moe"
    )
    silent = key is None or (not isinstance(noise, jax.Array) and noise == 0)
    self._sow("load", self.load, counted if silent else expected)
    return routing

  def _priority(self, sent: Routing) -> Float[Array, "M"]:
    assert sent.logits is not None
    return sureness(sent.logits, sent.experts)

  def _importance(self, wanted: Routing, logits: Array) -> Float[Array, "M E"]:
    return jax.nn.softmax(logits)
