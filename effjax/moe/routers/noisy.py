"""Noisy top-k gating, whose noise has a size that is learned (Shazeer et al., arXiv 1701.06538)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax.core.known import number
from effjax.core.typing import Array, Float, Key, Number, Scalar, Size
from effjax.layers import Routing
from effjax.moe.losses import expert_shares, load_loss, variation
from effjax.moe.routers.top_k import TopK, top_k_routing

LEAST_STDDEV = 1e-2


def noisy_top_k_routing(
  logits: Float[Array, "... E"],
  stddev: Float[Array, "... E"] | Scalar,
  key: Key | None,
  *,
  k: Size,
  renormalize: bool = True,
) -> Routing:
  """`top_k_routing` of the noisy logits H = logits + σ · ε with ε ~ N(0, 1).

  In the paper (equations 3 to 5) σ = softplus(x W_noise), and the gates are the softmax over the
  chosen H. The decision's `logits` are H.

  Args:
    logits: x W.
    stddev: σ from 0, an array or one number for all.
    key: of ε; None leaves out the noise, as in evaluation.
    k, renormalize: as in `top_k_routing`.

  Raises:
    ValueError: when k or σ is out of range.

  Example:
    >>> logits = jnp.array([[0.0, 1.0, 2.0]])
    >>> noisy_top_k_routing(logits, 1.0, None, k=2).experts.tolist()
    [[2, 1]]
    >>> noisy_top_k_routing(logits, 9.0, jax.random.key(0), k=2).logits.shape
    (1, 3)
  """
  stddev = number("stddev", stddev, of="noisy_top_k_routing", least=0, shape=tuple(logits.shape))
  return top_k_routing(noisy(logits, stddev, key), k=k, renormalize=renormalize)


def noisy(logits: Array, stddev: Array | Scalar, key: Key | None) -> Float[Array, "... E"]:
  """logits + σ · ε in float32; without a key the logits."""
  logits = logits.astype(jnp.float32)
  return logits if key is None else logits + stddev * jax.random.normal(key, logits.shape)


class NoisyTopK(TopK):
  """A router: each token to k experts, by `noisy_top_k_routing`, with noise in training.

  σ = softplus(x W_noise) + 1e-2. Parameters, losses and metrics are those of `Scored`, and
  "noise" [D, E]; both matrices start at zero, so that at first the noise alone decides. The
  balance losses are those of H; without noise the load is counted, and has no gradient.

  Attributes:
    top_k, renormalize, scale, limit: as in `TopK`.
    importance: coefficient of CV² of the sums of gates (0.1 in the paper).
    load: coefficient of `load_loss`.
  """

  _: dataclasses.KW_ONLY
  load_balance: Number = 0.0
  z: Number = 0.0
  importance: Number = 0.1
  load: Number = 0.1

  _kernel_init = staticmethod(nn.initializers.zeros)

  def _choose(self, rows, logits, mask, key) -> Routing:
    size = self._product("noise", nn.initializers.zeros, rows, mask)
    stddev = jax.nn.softplus(size) + LEAST_STDDEV
    routing: Any = self._best(noisy(logits, stddev, key))  # with logits
    counted = lambda: variation(expert_shares(routing.experts, self.experts, mask=mask))
    expected = lambda: load_loss(logits, routing.logits, stddev, k=self.top_k, mask=mask)
    self._sow("load", self.load, counted if key is None else expected)
    return routing

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward, of the logits and, in training, of the noise."""
    return 4.0 * width * self.experts

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    return super().axes | {"noise": ("embed", "experts")}
