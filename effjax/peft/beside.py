"""What adapters are: weights with trained arrays beside a frozen base.

An `Adapter` adds to what its base gives; `Tuned` is a parameter of its own, new or in place of a
frozen one. Both are known by their kind, so that `trees.trained`, checkpoints, `detach` and
`attach` treat every method alike.
"""

import abc
import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from effjax.core import weights
from effjax.core.register import register
from effjax.core.typing import Array, Float, PyTree
from effjax.core.weights import Over, Weight, linear


class Adapter(Over):
  """x W + b = y + added(x, y, b), where y = x W0 + b is what the frozen `base` W0 gives."""

  def check(self) -> None:
    if weights.entries(self.base) != self.base.shape[0]:
      raise ValueError(
        f"{type(self).__name__}: base {self.base!r} has rows beside its matrix, which this would "
        "take for others; allowed: the other order, a soft prompt over adapters"
      )

  @abc.abstractmethod
  def added(self, x: Float[Array, "... D"], y: Float[Array, "... F"], bias: Any) -> Array:
    """What it adds to y = x W0 + bias, in the type of x."""

  def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    return self.affine(x, None)

  def affine(self, x: Float[Array, "... D"], bias: Any) -> Float[Array, "... F"]:
    y = linear(x, self.base, bias)
    return y + self.added(x, y, bias)

  def beneath(self, w: Float[Array, "... D F"]) -> Array:
    """The base for which `materialize` gives w, up to rounding.

    Raises:
      ValueError: where there is no telling.
    """
    raise ValueError(f"{self!r} cannot be taken out of a matrix again; allowed: to keep its base")


@register(static=("new",), trains=("value",), kind="adapter")
class Tuned(Over):
  """A parameter that trains beside frozen ones: a bias in BitFit, a prefix, an adapter's matrix.

  Invariants:
    base: the frozen array or `Weight` in whose place it stands, or None for one that is new.
    value: the array that stands there, of any shape, that of `base` where there is one.
    new: whether it stands where there was nothing; None means that `base` says so. It is known
      where the base has been taken away, too.
  """

  value: PyTree
  new: bool | None = None

  def __post_init__(self):
    if self.new is None:
      object.__setattr__(self, "new", self.base is None)
    super().__post_init__()

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.value.shape)

  @property
  def dtype(self) -> jnp.dtype:
    return self.value.dtype

  @property
  def entries(self) -> int:
    return self.shape[0]

  @property
  def parameters(self) -> int:
    return 0 if self.value is None else math.prod(self.shape)

  @property
  def flops(self) -> float:
    return 2.0 * self.shape[-2] * self.shape[-1] if self.ndim > 1 else 0.0

  def check(self) -> None:
    if self.base is not None and tuple(self.base.shape) != self.shape:
      raise ValueError(f"Tuned: value has shape {self.shape}; allowed: {tuple(self.base.shape)}")

  def specs(self, axes: Sequence[Any]) -> "Tuned":
    base = None if self.base is None else weights.specs(self.base, axes)
    return Tuned(base, weights.specs(self.value, axes), self.new)

  def materialize(self) -> Array:
    return self.value

  def beneath(self, w: Array) -> Array:
    return weights.materialize(self.base)

  @property
  def T(self) -> Any:
    return jnp.matrix_transpose(self.value)


def is_adapter(leaf: Any) -> bool:
  """Whether `leaf` is a weight with trained arrays beside a frozen base."""
  return isinstance(leaf, Weight) and leaf.kind == "adapter"


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
  """ValueErrors say that they are about what is at `path`."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
