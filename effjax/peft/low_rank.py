"""LoRA as a weight: a frozen matrix plus a trained low-rank one (arXiv 2106.09685, section 4.1)."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import numerics, weights
from effjax.core.known import number
from effjax.core.typing import Array, Float, Int, Key, PyTree
from effjax.core.weights import Weight, linear, materialize, register, transpose
from effjax.peft.beside import Adapter


@register(trains=("a", "b"), static=("dropout",), kind="adapter")
class LoRA(Adapter):
  """W = W0 + s·A B, computed as x W0 + s·(x A) B.

  In a step of training, x A may see x with each number dropped at the rate p, and the others
  divided by 1 − p; rows that are looked up, and the products of a tied head, see all.

  Invariants:
    base: W0, an array or `Weight` [..., D, F].
    a, b: [..., D, r] and [..., r, F]; A B = 0 at the start, so that W = W0.
    scale: s, [..., 1, 1]: α/r, or α/√r for rsLoRA. An array, so that scanned layers may differ.
    dropout: p, 0 ≤ p < 1.
    key: what decides on the numbers dropped, [...]; absent but for a step of training (`drawn`).
  The type is that of the base; a, b and scale are float32, and products are in the type of x.
  """

  a: PyTree
  b: PyTree
  scale: PyTree
  dropout: float = dataclasses.field(default=0.0, kw_only=True)
  key: PyTree = dataclasses.field(default=None, kw_only=True)

  @property
  def rank(self) -> int:
    return self.a.shape[-1]

  @property
  def parameters(self) -> int:
    return super().parameters + math.prod(self.a.shape) + math.prod(self.b.shape)

  @property
  def flops(self) -> float:
    D, F = self.shape[-2:]
    return super().flops + 2.0 * self.rank * (D + F)

  def check(self) -> None:
    super().check()
    *batch, D, F = self.shape
    for name, allowed in (("a", (D, self.rank)), ("b", (self.rank, F)), ("scale", (1, 1))):
      self._check_shape(name, (*batch, *allowed))
    number("dropout", self.dropout, of=type(self).__name__, least=0, below=1)

  def specs(self, axes: Sequence[Any]) -> "LoRA":
    *batch, inputs, outputs = axes
    split = {
      "base": axes,
      "a": (*batch, inputs, None),
      "b": (*batch, None, outputs),
      "scale": (*batch, None, None),
    }
    if self.key is not None:
      split["key"] = (*batch,)
    return self._with_specs(split)

  def drawn(self, key: Key) -> Weight:
    if not self.dropout:
      return super().drawn(key)
    own, below = jax.random.split(key)
    return dataclasses.replace(super().drawn(below), key=jax.random.split(own, self.shape[:-2]))

  def from_row(self, first: Int[Array, ""]) -> Weight:
    if self.key is None:
      return super().from_row(first)
    return dataclasses.replace(super().from_row(first), key=jax.random.fold_in(self.key, first))

  def delta(self) -> Float[Array, "..."]:
    """s·A B, [..., D, F] in float32."""
    return jnp.matmul(self.a * self.scale, self.b, precision=jax.lax.Precision.HIGHEST)

  def materialize(self) -> Array:
    base = materialize(self.base)
    return (base.astype(numerics.wide(base.dtype)) + self.delta()).astype(base.dtype)

  def beneath(self, w: Float[Array, "... D F"]) -> Array:
    return (w.astype(numerics.wide(w.dtype)) - self.delta()).astype(w.dtype)

  def added(self, x: Float[Array, "... D"], y: Float[Array, "... F"], bias: Any) -> Array:
    return self.low_rank(self.dropped(x))

  def product(self, x: Array, multiply: Callable[[Array, Any], Array]) -> Array:
    low_rank = multiply(multiply(self.dropped(x), self.a * self.scale), self.b)
    return weights.product(x, self.base, multiply) + low_rank

  def lookup(self, indices: Int[Array, "..."]) -> Float[Array, "... F"]:
    rows = weights.lookup(self.base, indices)
    return rows + self._scaled(linear(weights.lookup(self.a, indices), self.b)).astype(rows.dtype)

  @property
  def T(self) -> Any:
    base, a, b = (transpose(x) for x in (self.base, self.a, self.b))
    return LoRA(base, b, a, self.scale)

  def dropped(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """x as the factors see it: whole, or in a step of training with the dropout drawn."""
    if self.key is None:
      return x
    keep = 1 - self.dropout
    first = self.key[(0,) * len(self.shape[:-2])]
    kept = jax.random.bernoulli(first, keep, x.shape)
    return jnp.where(kept, x / keep, jnp.zeros((), x.dtype))

  def low_rank(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    """s·(x A) B in the type of x."""
    return self._scaled(linear(linear(x, self.a), self.b))

  def _scaled(self, y: Array) -> Array:
    return y * self.scale.reshape(()).astype(y.dtype)

  def _check_shape(self, name: str, allowed: tuple[int, ...]) -> None:
    given = tuple(getattr(self, name).shape)
    if given != allowed:
      raise ValueError(f"{type(self).__name__}: {name} has shape {given}; allowed: {allowed}")

  def _with_specs(self, split: dict[str, Sequence[Any]]) -> Any:
    fields = {name: weights.specs(getattr(self, name), axes) for name, axes in split.items()}
    return dataclasses.replace(self, **fields)
