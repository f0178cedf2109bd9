"""What routers with scores x W have in common: the product, the losses and their health."""

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax.core.known import is_id, number
from effjax.core.numerics import weighted_mean, zero_unless
from effjax.core.typing import Array, Bool, Float, Int, Key, Number, Size
from effjax.core.weights import linear
from effjax.layers import Context, ExpertRouting, Routing, weight
from effjax.layers.linear import KERNEL_INIT
from effjax.moe.losses import (
  chosen_gates,
  expert_shares,
  importance_loss,
  load_balance_loss,
  mutual_information_loss,
  z_loss,
)
from effjax.moe.routers.capacity import Capacity, drop_overflow
from effjax.moe.routers.health import sow_health


class Scored(nn.Module):
  """A router by logits x W: the product is in float32, whatever the type of x.

  Parameter: "kernel" [D, E], an array or a `Weight`.

  Attributes:
    experts: number of experts E.
    z: coefficient of `z_loss`, under "router_z".
    mutual_information: coefficient of `mutual_information_loss`.

  Sown, one scalar a call; a loss with coefficient 0 is not, but for two that are always measured:

  | collection | name | |
  |---|---|---|
  | "losses" | "load_balance", "router_z", … | the loss times its coefficient |
  | "metrics" | "load_balance_raw", "router_z_raw", … | without it; these two always |

  and what `health.sow_health` sows of the choices.
  """

  experts: Size
  _: dataclasses.KW_ONLY
  z: Number = 0.0
  mutual_information: Number = 0.0

  @nn.compact
  def __call__(
    self,
    rows: Float[Array, "M D"],
    context: Context = Context(),
    mask: Bool[Array, "M"] | None = None,
  ) -> Routing | ExpertRouting:
    self._check()
    rows = zero_unless(mask, rows).astype(jnp.float32)
    key = self.make_rng("router") if self.has_rng("router") else None
    logits = self._product("kernel", self._kernel_init, self._seen(rows, key), mask)
    return self._decide(rows, logits, mask, key)

  _kernel_init = staticmethod(KERNEL_INIT)

  def _product(
    self, name: str, init: Callable, rows: Array, mask: Array | None
  ) -> Float[Array, "M E"]:
    kernel = weight(self, name, init, (rows.shape[-1], self.experts))
    return zero_unless(mask, linear(rows, kernel))

  def _seen(self, rows: Float[Array, "M D"], key: Key | None) -> Float[Array, "M D"]:
    """What the logits are the product of."""
    return rows

  @abstractmethod
  def _decide(
    self, rows: Array, logits: Array, mask: Array | None, key: Key | None
  ) -> Routing | ExpertRouting:
    """The decision, its losses sown; padding has zeros, and a key is there in training."""

  def _check(self) -> None:
    """Raises ValueError for fields out of range."""
    number("experts", self.experts, of=type(self).__name__, integer=True, least=1)

  def _sow(self, name: str, coefficient: Number, loss: Callable[[], Array], *, always=False):
    """A loss under "losses" and "metrics", where its coefficient is not known to be 0."""
    coefficient = number(name, coefficient, of=type(self).__name__)
    on = isinstance(coefficient, jax.Array) or coefficient != 0
    if on or always:
      value = loss()
      self.sow("metrics", f"{name}_raw", value)
      if on:
        self.sow("losses", name, coefficient * value)

  def _sow_scores(self, probs: Array, logits: Array, mask: Array | None) -> None:
    """The losses of the scores alone."""
    self._sow("router_z", self.z, lambda: z_loss(logits, mask=mask), always=True)
    information = lambda: mutual_information_loss(probs, mask=mask)
    self._sow("mutual_information", self.mutual_information, information)

  @property
  def used(self) -> float:
    """Experts that a token visits."""
    return 1.0

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward."""
    return 2.0 * width * self.experts

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    return {"kernel": ("embed", "experts")}


class TokenChoice(Scored):
  """A `Scored` router of which each token chooses its experts.

  Attributes:
    load_balance, normalization: coefficient and form of `load_balance_loss`.
    devices, device_balance: groups of experts, and the coefficient of their `load_balance_loss`.
    importance: coefficient of `importance_loss`.
    capacity: what an expert takes at most, see `Capacity`; None is no limit.
  """

  _: dataclasses.KW_ONLY
  load_balance: Number = 0.0
  normalization: str = "deepseek"
  devices: Size | None = None
  device_balance: Number = 0.0
  importance: Number = 0.0
  capacity: Capacity | None = None

  @abstractmethod
  def _choose(self, rows: Array, logits: Array, mask: Array | None, key: Key | None) -> Routing:
    """The choices of each token, before any is dropped."""

  def _dispatched(self, wanted: Routing, key: Key | None) -> Routing:
    """What is sent to the experts, if there is room."""
    return wanted

  def _decide(self, rows, logits, mask, key) -> Routing:
    wanted: Any = self._choose(rows, logits, mask, key)  # with probs and logits
    sent = self._dispatched(wanted, key)
    routing = self._limited(sent, mask, training=key is not None)
    self._sow_scores(wanted.probs, logits, mask)
    self._sow_balance(wanted, logits, mask)
    load = expert_shares(wanted.experts, self.experts, mask=mask)
    sow_health(self, load, self._dropped(sent.experts, routing.experts, mask))
    return routing

  def _limited(self, sent: Routing, mask: Array | None, *, training: bool) -> Routing:
    if self.capacity is None:
      return sent
    rows, k = sent.experts.shape
    limit = self.capacity.of(rows, experts=self.experts, choices=k, training=training)
    if limit is None:
      return sent
    return drop_overflow(
      sent,
      limit,
      count=self.experts,
      mask=mask,
      priority=self._priority(sent),
      renormalize=self._renormalizes_after,
    )

  def _priority(self, sent: Routing) -> Float[Array, "M"] | None:
    """Who comes first where an expert is full; None is the earlier row."""
    return None

  @property
  def _renormalizes_after(self) -> bool:
    """Whether what a row keeps is divided by its sum."""
    return False

  def _dropped(self, sent: Int[Array, "M k"], kept: Int[Array, "M k"], mask: Array | None):
    if kept is sent:
      return jnp.float32(0)
    there = is_id(sent, self.experts) if mask is None else is_id(sent, self.experts) & mask[:, None]
    return weighted_mean((~is_id(kept, self.experts)).astype(jnp.float32), there)

  def _sow_balance(self, wanted: Any, logits: Array, mask: Array | None) -> None:
    balance = functools.partial(
      load_balance_loss,
      wanted.probs,
      wanted.experts,
      mask=mask,
      normalization=self.normalization,
    )
    self._sow("load_balance", self.load_balance, balance, always=True)
    devices = self.devices
    self._sow("device_balance", self.device_balance, lambda: balance(devices=devices))
    gates = lambda: self._importance(wanted, logits)
    self._sow("importance", self.importance, lambda: importance_loss(gates(), mask=mask))

  def _importance(self, wanted: Routing, logits: Array) -> Float[Array, "M E"]:
    """What a token gives to each expert, of which importance is the sum."""
    return chosen_gates(wanted.experts, wanted.gates, self.experts)
