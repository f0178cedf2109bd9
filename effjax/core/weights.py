"""What may stand where a matrix stood.

A model computes `linear(x, w)`. When `w` is an array that is x @ w. When it is a `Weight`, the
representation decides: a quantised weight scales after an integer-valued product, LoRA adds a
low-rank path. A technique thus changes values and leaves model code alone, and representations
nest: LoRA over a quantised base is a `LoRA` whose `base` is that weight.

Invariants of a `Weight`:
  * it is a pytree (`register`), so jit, grad, scan, sharding and checkpoints see its arrays;
  * `shape` is the logical shape [..., D, F]: leading axes (stacked layers, experts) are batch axes
    and every array field carries them, so indexing each field indexes the weight;
  * a field may be a dict of such arrays and weights;
  * `matmul(x)` equals `x @ materialize()` up to the representation's own rounding;
  * an array field whose default is None may be absent, as what a step of training draws is before
    and after it.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from effjax.core import numerics
from effjax.core.known import check_ids, is_id
from effjax.core.register import register
from effjax.core.typing import Array, Float, Int, Integer, Key, PyTree

_PICKED = "picked"  # the axis of the units in `Weight.pick`


class Weight(abc.ABC):
  """A matrix [..., D, F] in some representation; a subclass is made by `register`."""

  static: ClassVar[tuple[str, ...]] = ()
  trains: ClassVar[tuple[str, ...]] = ()
  kind: ClassVar[str] = "matrix"
  __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # of what `register` makes
  __array_ufunc__ = None  # numpy leaves x @ w to `__rmatmul__`

  @classmethod
  def represent(cls, path: str, w: Float[Array, "... D F"], **options: Any) -> "Weight":
    """What stands for the parameter w at `path`: a "quantised" one that has it is a method."""
    raise NotImplementedError(f"{cls.__name__} has no represent")

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

  def affine(self, x: Float[Array, "... D"], bias: Any) -> Float[Array, "... F"]:
    """x @ W + bias; `bias` is [F] or None."""
    return _add_bias(self.matmul(x), offset(self, bias))

  def offset(self, bias: Any) -> Any:
    """What x @ W + bias adds: `bias` [..., F] or None, but for weights that scale outputs whole."""
    return bias

  def product(self, x: Array, multiply: Callable[[Array, Any], Array]) -> Array:
    """x W by `multiply(x, w)`, another product than that of rows with one matrix.

    Such is the grouped product of rows with one of several matrices each, where W has a leading
    axis. A sum multiplies by its parts, so that none is rounded to the type of another and a
    low-rank one stays so. A part w is an array, or a `Weight` that a kernel may know to unpack.
    """
    return multiply(x, self.materialize())

  @property
  def by_parts(self) -> bool:
    """Whether it is to be multiplied by `product` alone, since not all fields have its first axis.

    So it is where one matrix stands for several.
    """
    return any(isinstance(value, Weight) and value.by_parts for _, value in _arrays(self))

  def along(self, x: Float[Array, "... F"]) -> Array:
    """A vector [F] as it is added to x, or multiplies it: of a shape that broadcasts."""
    return numerics.expand(self.materialize(), x.ndim)

  def take(self, indices: Integer[Array | np.ndarray, "..."]) -> Float[Array, "... F"]:
    """Rows W[indices], as an embedding table gives them; see the function `take`."""
    return take(self, indices)

  def lookup(self, indices: Int[Array, "..."]) -> Float[Array, "... F"]:
    """Rows W[indices], the indices all within 0 … entries − 1: what `take` asks for."""
    return lookup(self.materialize(), indices)

  @property
  def T(self) -> "Weight":
    """The transpose [..., F, D], which multiplies without the matrix being written out."""
    return Transposed(self)

  def within(self, function: Callable, *arguments: Any) -> Any:
    """function(W, *arguments), for whoever uses W otherwise than by a product.

    A representation that must be put together first (from the devices of a mesh, say) hands over
    what it has become.
    """
    return function(self, *arguments)

  def drawn(self, key: Key) -> "Weight":
    """Itself as one step of training has it: a representation with randomness draws it from `key`.

    One with leading axes draws for each of its matrices, in an array that has these axes too.
    """
    return self

  def moves(self, name: str, value: Any) -> bool:
    """Whether training moves what is in a field: an array of `trains`, or another weight's."""
    return isinstance(value, Weight) or name in self.trains

  def from_row(self, first: Int[Array, ""]) -> "Weight":
    """Itself for the rows from number `first` on, where rows are multiplied some at a time.

    What it draws for a row must not be what it draws for a row of another such product.
    """
    return self

  def specs(self, axes: Sequence[Any]) -> "Weight":
    """How its fields are split when the matrix is split over mesh axes `axes`, one for each axis.

    Args:
      axes: for each axis of `shape` the name of a mesh axis, several, or None.

    Returns:
      The weight with a `PartitionSpec` for each array: an axis that has the matrix's length at its
      place is split as the matrix is, any other is not.
    """
    fields = [_specs(value, self.shape, axes) for _, value in _arrays(self)]
    inner = lambda x: x is not self and x is not None
    return jax.tree.unflatten(jax.tree.structure(self, is_leaf=inner), fields)

  def pick(self, units: Int[Array | np.ndarray, "n"], axis: int) -> "Weight":
    """The rows (axis −2) or columns (−1) `units` of W in the same representation; see `pick`.

    For one whose numbers each belong to one unit or to all, as its `specs` says.
    """
    axes: list[Any] = [None] * self.ndim
    axes[axis] = _PICKED
    split, fields = self.specs(axes), dict[str, Any]()
    for name, value in ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self)):
      if isinstance(value, Weight) and value.shape == self.shape:
        fields[name] = value.pick(units, axis)
      elif isinstance(value, Weight | dict):
        raise ValueError(_not_of_units(self, axis))
      elif name not in self.static and value is not None:
        spec = tuple(getattr(split, name))
        if _PICKED in spec:
          place = spec.index(_PICKED)
          if value.shape[place] != self.shape[axis]:
            raise ValueError(_not_of_units(self, axis))
          fields[name] = jnp.take(value, units, place)
    picked = dataclasses.replace(self, **fields)
    if not fields or picked.shape[axis] != len(units):
      raise ValueError(_not_of_units(self, axis))
    return picked

  @property
  def entries(self) -> int:
    """How many rows `take` knows by an index."""
    return self.shape[0]

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

  def check(self) -> None:
    """Raises ValueError where the fields do not fit one another; called when one is made."""
    batch = tuple(self.shape[:-2])
    for name, value in _arrays(self):
      if tuple(value.shape[: len(batch)]) != batch:
        raise ValueError(
          f"{type(self).__name__}: {name} has shape {tuple(value.shape)}; allowed: leading axes "
          f"{batch}, those of its shape {tuple(self.shape)}"
        )

  def __post_init__(self):
    for name, value in _arrays(self):
      if isinstance(value, int | float | complex):
        raise ValueError(f"{type(self).__name__}: {name}={value!r}; allowed: arrays")
    if all(_is_array(value) for _, value in _arrays(self)):
      self.check()

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return np.asarray(self.materialize(), dtype)

  def __rmatmul__(self, x: Any) -> Array:
    """x @ W for an array [..., D], in the type that both are promoted to."""
    return linear(self._promoted(x), self)

  def __matmul__(self, x: Any) -> Array:
    """W @ x for an array [F] or [F, M], in the type that both are promoted to."""
    x = self._promoted(x)
    if x.ndim not in (1, 2):
      raise ValueError(f"{self!r} @ {x.shape}; allowed: vectors [F] and matrices [F, M]")
    return linear(x.T, self.T).T

  def _promoted(self, x: Any) -> Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, self.dtype))

  def __repr__(self) -> str:
    name = type(self).__name__
    try:
      return f"{name}[{', '.join(map(str, self.shape))}] {jnp.dtype(self.dtype).name}"
    except (AttributeError, TypeError):  # what tree maps have put in place of the arrays
      return f"{name}(…)"


@dataclasses.dataclass(frozen=True, repr=False)
class Over(Weight):
  """What stands over another matrix: but for what a subclass says, it is as that one.

  Invariants:
    base: an array or `Weight` [..., D, F].
  """

  base: PyTree

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.base.shape)

  @property
  def dtype(self) -> jnp.dtype:
    return self.base.dtype

  @property
  def parameters(self) -> int:
    if self.base is None:  # as where `trees.partition` has taken the base away
      return 0
    return self.base.parameters if isinstance(self.base, Weight) else math.prod(self.base.shape)

  @property
  def flops(self) -> float:
    return self.base.flops if isinstance(self.base, Weight) else super().flops

  def offset(self, bias: Any) -> Any:
    return offset(self.base, bias)

  @property
  def entries(self) -> int:
    return self.shape[0] + entries(self.base) - self.base.shape[0]

  def drawn(self, key: Key) -> "Weight":
    if not isinstance(self.base, Weight):
      return self
    return dataclasses.replace(self, base=self.base.drawn(key))

  def from_row(self, first: Int[Array, ""]) -> "Weight":
    if not isinstance(self.base, Weight):
      return self
    return dataclasses.replace(self, base=self.base.from_row(first))

  def __repr__(self) -> str:
    over = f" over {type(self.base).__name__}" if isinstance(self.base, Weight) else ""
    return super().__repr__() + over


@register(kind="wrapper")
class Transposed(Over):
  """Wᵀ for a `Weight` W: x Wᵀ is the transpose of the linear map x ↦ x W, applied to x.

  So a tied head over a quantised table costs what the backward pass of the product does, and no
  representation needs a second kernel.
  """

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.base.shape[:-2], self.base.shape[-1], self.base.shape[-2])

  def materialize(self) -> Array:
    return jnp.matrix_transpose(self.base.materialize())

  def specs(self, axes: Sequence[Any]) -> "Transposed":
    *batch, outputs, inputs = axes
    return Transposed(_specs(self.base, self.base.shape, (*batch, inputs, outputs)))

  def matmul(self, x: Float[Array, "... F"]) -> Float[Array, "... D"]:
    anywhere = jnp.zeros((*x.shape[:-1], self.shape[-1]), x.dtype)
    return jax.vjp(self.base.matmul, anywhere)[1](x)[0]

  @property
  def T(self) -> Weight:
    return self.base


def trained(path: str, leaf: Any) -> Iterator[tuple[str, str]]:
  """(path, kind) of each array in `leaf`, an array or a `Weight`, that a training would move."""
  if not isinstance(leaf, Weight):
    if leaf is not None and jnp.issubdtype(leaf.dtype, jnp.inexact):
      yield path, "matrix"
    return
  for name, value in _arrays(leaf):
    if leaf.moves(name, value):
      for inner, kind in trained(f"{path}/{name}", value):
        yield inner, kind if isinstance(value, Weight) else leaf.kind


def linear(x: Float[Array, "... D"], w: Any, bias: Any = None) -> Array:
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
  if bias is not None and tuple(bias.shape) != (w.shape[1],):
    raise ValueError(f"linear: bias {bias.shape} does not fit w {w.shape}; allowed: [F]")
  return w.affine(x, bias) if isinstance(w, Weight) else _add_bias(numerics.matmul(x, w), bias)


def take(
  w: Any, indices: Integer[Array | np.ndarray, "..."], name: str = "indices"
) -> Float[Array, "... D"]:
  """Rows of an embedding table [V, D], an array or a `Weight`; NaN for a traced id that is none.

  Args:
    w: the table.
    indices: ids [...].
    name: what a message calls them.

  Raises:
    ValueError: for ids, where they are known, that are not among the `entries` of the table.

  Example:
    >>> table = jnp.arange(6.0).reshape(3, 2)
    >>> take(table, jnp.array([2, 0])).tolist(), jax.jit(take)(table, jnp.array([-1])).tolist()
    ([[4.0, 5.0], [0.0, 1.0]], [[nan, nan]])
  """
  check_ids(name, indices, entries(w))
  there = is_id(indices, entries(w))
  return numerics.nan_unless(there, lookup(w, jnp.where(there, indices, 0).astype(jnp.int32)))


def entries(w: Any) -> int:
  """How many rows of an array or a `Weight` [V, D] have an index: V, unless it knows more."""
  return w.entries if isinstance(w, Weight) else w.shape[0]


def lookup(w: Any, indices: Int[Array, "..."]) -> Array:
  """Rows of an array or a `Weight`, the indices all within it."""
  return w.lookup(indices) if isinstance(w, Weight) else jnp.take(w, indices, axis=0, mode="clip")


def product(x: Array, w: Any, multiply: Callable[[Array, Any], Array]) -> Array:
  """multiply(x, w), by parts where `w` is a `Weight` made of several."""
  return w.product(x, multiply) if isinstance(w, Weight) else multiply(x, w)


def offset(w: Any, bias: Any) -> Any:
  """What is added to a product with `w`, an array or a `Weight`, for the sake of `bias`."""
  return w.offset(bias) if isinstance(w, Weight) and bias is not None else bias


def within(w: Any, function: Callable, *arguments: Any) -> Any:
  """function(w, *arguments), where a `Weight` decides what of it the function is given."""
  return w.within(function, *arguments) if isinstance(w, Weight) else function(w, *arguments)


def from_row(w: Any, first: Int[Array, ""]) -> Any:
  """An array, or a `Weight` for the rows from number `first` on."""
  return w.from_row(first) if isinstance(w, Weight) else w


def along(vector: Any, x: Float[Array, "... F"]) -> Array:
  """`vector` [F], an array or what stands for one, as it is added to x or multiplies it."""
  return vector.along(x) if isinstance(vector, Weight) else numerics.expand(vector, x.ndim)


def transpose(w):
  """W with its last two axes swapped, an array or a `Weight`."""
  return w.T if isinstance(w, Weight) else jnp.matrix_transpose(w)


def materialize(w) -> Array:
  """The plain array behind an array or a `Weight`."""
  return w.materialize() if isinstance(w, Weight) else w


def pick(w: Any, units: Int[Array | np.ndarray, "n"], axis: int) -> Any:
  """The rows (axis −2) or columns (−1) `units` of an array or a `Weight`, in their order.

  Of a vector they are entries (−1). Units may be traced, and named more than once.

  Raises:
    ValueError: for a `Weight` whose numbers are made of several units, such as four-bit codes of
      two rows in a byte.

  Example:
    >>> pick(jnp.arange(6.0).reshape(2, 3), jnp.array([2, 0]), -1).tolist()
    [[2.0, 0.0], [5.0, 3.0]]
  """
  return w.pick(units, axis) if isinstance(w, Weight) else jnp.take(w, units, axis)


def specs(w: Any, axes: Sequence[Any]) -> Any:
  """How an array or the fields of a `Weight` are split when the matrix is split over `axes`."""
  return w.specs(axes) if isinstance(w, Weight) else PartitionSpec(*axes)


def is_weight(node) -> bool:
  """Whether `node` is a `Weight`: the `is_leaf` of trees that treat weights as leaves."""
  return isinstance(node, Weight)


def _add_bias(y: Array, bias: Any) -> Array:
  return y if bias is None else y + along(bias, y).astype(y.dtype)


def _not_of_units(w: Weight, axis: int) -> str:
  units = "rows" if axis == -2 else "columns"
  allowed = "what holds them apart, an array such as merging or dequantizing gives"
  return f"{w!r} has no {units} that stand alone; allowed: {allowed}"


def _arrays(w: Weight) -> list[tuple[str, Any]]:
  """Names and values of the fields that are neither static nor absent, and of dicts in them."""
  fields = ((f, getattr(w, f.name)) for f in dataclasses.fields(w) if f.name not in w.static)
  there = [(f.name, value) for f, value in fields if value is not None or f.default is not None]
  return [each for name, value in there for each in _entries(name, value)]


def _entries(name: str, value: Any) -> list[tuple[str, Any]]:
  if not isinstance(value, dict):
    return [(name, value)]
  return [(f"{name}/{key}", value[key]) for key in sorted(value)]


def _is_array(value: Any) -> bool:
  if isinstance(value, Weight):
    return all(_is_array(x) for _, x in _arrays(value))
  return hasattr(value, "shape") and hasattr(value, "dtype")


def _specs(value: Any, shape: tuple[int, ...], axes: Sequence[Any]) -> Any:
  sizes = zip(value.shape, shape, axes, strict=True)
  return specs(value, [axis if size == whole else None for size, whole, axis in sizes])
