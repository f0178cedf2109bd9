"""What may stand where a matrix stood.

A model computes `linear(x, w)`. When `w` is an array that is x @ w. When it is a `Weight`, the
representation decides: a quantised weight scales after an integer-valued product, LoRA adds a
low-rank path. A technique thus changes values and leaves model code alone, and representations
nest: LoRA over a quantised base is a `LoRA` whose `base` is that weight.

Invariants of a `Weight`:
  * it is a pytree (`register`), so jit, grad, scan, sharding and checkpoints see its arrays;
  * `shape` is the logical shape [..., D, F]: leading axes (stacked layers, experts) are batch axes
    and every array field carries them, so indexing each field indexes the weight;
  * `matmul(x)` equals `x @ materialize()` up to the representation's own rounding.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from effjax.core import numerics
from effjax.core.typing import Array, Float, Int

T = TypeVar("T")


class Weight(abc.ABC):
  """A matrix [..., D, F] in some representation."""

  @property
  @abc.abstractmethod
  def shape(self) -> tuple[int, ...]:
    """Logical shape [..., D, F]."""

  @property
  @abc.abstractmethod
  def dtype(self) -> jnp.dtype:
    """Type of the matrix that `materialize` returns."""

  @abc.abstractmethod
  def materialize(self) -> Array:
    """The matrix as a plain array of shape `shape`."""

  def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    """x @ W in the type of `x`."""
    return numerics.matmul(x, self.materialize())

  def take(self, indices: Int[Array, "..."]) -> Float[Array, "... F"]:
    """Rows W[indices], as an embedding table gives them."""
    return jnp.take(self.materialize(), indices, axis=0)

  @property
  def T(self):
    """The transpose [..., F, D]; by default of the materialized matrix."""
    return jnp.matrix_transpose(self.materialize())

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def parameters(self) -> int:
    """How many parameters it stands for; a representation that adds some counts them too."""
    return math.prod(self.shape)

  @property
  def flops(self) -> float:
    """FLOPs of the product of one row x[D] with one matrix [D, F]."""
    return 2.0 * self.shape[-2] * self.shape[-1]


@dataclass_transform(frozen_default=True)
def register(*, static: tuple[str, ...] = ()) -> Callable[[type[T]], type[T]]:
  """Class decorator: a frozen dataclass and pytree whose fields are arrays, but for `static`.

  Annotate array fields as `PyTree`: tree maps put shapes, shardings and None in their place.
  """

  def wrap(cls: type[T]) -> type[T]:
    cls = dataclasses.dataclass(frozen=True)(cls)
    arrays = [f.name for f in dataclasses.fields(cls) if f.name not in static]
    return jax.tree_util.register_dataclass(cls, data_fields=arrays, meta_fields=list(static))

  return wrap


def linear(x: Float[Array, "... D"], w, bias: Float[Array, "F"] | None = None) -> Array:
  """x @ w + bias, computed in the type of `x`, for an array or any `Weight`.

  Args:
    x: activations [..., D].
    w: an array [D, F] or a `Weight` of that shape.
    bias: [F], or None.

  Raises:
    ValueError: when the shapes do not fit.

  Example:
    >>> import jax.numpy as jnp
    >>> linear(jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones(4)).tolist()[0]
    [4.0, 4.0, 4.0, 4.0]
  """
  if len(w.shape) != 2 or x.shape[-1] != w.shape[0]:
    raise ValueError(f"linear: x {x.shape} does not fit w {w.shape}; allowed: x [..., D], w [D, F]")
  y = w.matmul(x) if isinstance(w, Weight) else numerics.matmul(x, w)
  if bias is None:
    return y
  if bias.shape != (w.shape[1],):
    raise ValueError(f"linear: bias {bias.shape} does not fit w {w.shape}; allowed: [F]")
  return y + numerics.expand(bias.astype(y.dtype), y.ndim)


def take(w, indices: Int[Array, "..."]) -> Array:
  """Rows of an embedding table [V, D], an array or a `Weight`."""
  return w.take(indices) if isinstance(w, Weight) else jnp.take(w, indices, axis=0)


def transpose(w):
  """W with its last two axes swapped, an array or a `Weight`."""
  return w.T if isinstance(w, Weight) else jnp.matrix_transpose(w)


def materialize(w) -> Array:
  """The plain array behind an array or a `Weight`."""
  return w.materialize() if isinstance(w, Weight) else w


def is_weight(node) -> bool:
  """Whether `node` is a `Weight`: the `is_leaf` of trees that treat weights as leaves."""
  return isinstance(node, Weight)
