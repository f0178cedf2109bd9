"""Matrices that lie in memory row by row, packed: what all of them have in common."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from effjax.core import numerics, weights
from effjax.core.known import number
from effjax.core.trees import is_table
from effjax.core.typing import Array, Float, Int, Num, PyTree, Size
from effjax.core.weights import Weight
from effjax.kernels.quantized_matmul import Format, Lying, packed_product


@dataclasses.dataclass(frozen=True, repr=False)
class ByRows(Weight):
  """W = Mᵀ, or M as the table of an embedding, for a matrix M [..., O, I].

  The rows of M are the outputs of a product, and those of a token table are its tokens, which are
  the outputs of the tied head.

  Invariants:
    dtype: type of the matrix that it stands for.
    table: whether W is M itself.
  """

  static = ("dtype", "table")
  dtype: Any = dataclasses.field(default=np.dtype(np.float32), kw_only=True)
  table: bool = dataclasses.field(default=False, kw_only=True)

  @property
  @abc.abstractmethod
  def lying_shape(self) -> tuple[int, ...]:
    """The shape of M."""

  @abc.abstractmethod
  def unpacked(self) -> Float[Array, "... O I"]:
    """M."""

  @classmethod
  @abc.abstractmethod
  def quantize(cls, w: Num[Array | np.ndarray, "... D F"], *, table: bool = False) -> "ByRows":
    """The nearest one of `w`."""

  @classmethod
  def represent(cls, path: str, w: Num[Array | np.ndarray, "... D F"], **options: Any) -> "ByRows":
    """`quantize`, a parameter named "embedding" being a table unless the options say otherwise."""
    return cls.quantize(w, **{"table": is_table(path), **options})

  @property
  def shape(self) -> tuple[int, ...]:
    *batch, outputs, inputs = self.lying_shape
    return (*batch, outputs, inputs) if self.table else (*batch, inputs, outputs)

  def materialize(self) -> Array:
    m = self.unpacked().astype(self.dtype)
    return m if self.table else jnp.matrix_transpose(m)

  @property
  def T(self) -> "ByRows":
    return dataclasses.replace(self, table=not self.table)


@dataclasses.dataclass(frozen=True, repr=False)
class Packed(ByRows):
  """M in blocks of consecutive inputs, which have as many bytes each.

  How M lies in memory is said in `effjax.kernels.quantized_matmul.formats`. A subclass adds the
  constants as fields, and `format`.

  Invariants: as `ByRows`, and
    codes: uint8 [..., O, n · size], n blocks of `format.size` bytes.
  """

  codes: PyTree

  @property
  @abc.abstractmethod
  def format(self) -> Format:
    """What the codes stand for."""

  @property
  def constants(self) -> tuple[Any, ...]:
    """The constants, arrays or weights, as `format.unpack` takes them."""
    names = (field.name for field in dataclasses.fields(self))
    return tuple(getattr(self, name) for name in names if name not in ("codes", *self.static))

  def check(self) -> None:
    *batch, outputs, size = self.codes.shape
    n, rest = divmod(size, self.format.size)
    if rest or self.codes.dtype != jnp.uint8:
      raise ValueError(
        f"{type(self).__name__}: codes are {self.codes.dtype}{list(self.codes.shape)}; allowed: "
        f"uint8, blocks of {self.format.size} bytes"
      )
    for constant in self.constants:
      given = tuple(constant.shape)
      allowed = (*batch, 1, *given[-1:]) if self.format.shares else (*batch, outputs, n)
      if given != allowed:
        raise ValueError(
          f"{type(self).__name__}: a constant has shape {given}; allowed: {allowed}, as the codes "
          f"are {tuple(self.codes.shape)}"
        )

  @property
  def lying_shape(self) -> tuple[int, ...]:
    *batch, outputs, size = self.codes.shape
    return (*batch, outputs, size // self.format.size * self.format.block)

  def unpacked(self) -> Float[Array, "... O I"]:
    return self.format.unpack(self.codes, *map(weights.materialize, self.constants))

  def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    y = packed_product(x, self.format, self.codes, *self.constants, inputs=not self.table)
    return y.astype(x.dtype)

  def product(self, x: Array, multiply: Callable[[Array, Any], Array]) -> Array:
    return multiply(x, self)

  @property
  def lying(self) -> Lying:
    """How stacked ones lie in memory."""
    constants = tuple(map(weights.materialize, self.constants))
    return Lying(self.format, self.codes, constants, self.table)

  def lookup(self, indices: Int[Array, "..."]) -> Float[Array, "... F"]:
    if not self.table:
      return super().lookup(indices)
    flat = indices.reshape(-1)
    rows = lambda w: weights.lookup(w, flat)
    constants = self.constants if self.format.shares else map(rows, self.constants)
    found = self.format.unpack(rows(self.codes), *constants).astype(self.dtype)
    return found.reshape(*indices.shape, self.shape[-1])

  def specs(self, axes: Sequence[Any]) -> "Packed":
    """As `Weight.specs`; a mesh axis that splits the inputs splits whole blocks of them."""
    *batch, first, last = axes
    outputs, inputs = (first, last) if self.table else (last, first)
    whole = (*batch, None, None)
    each = whole if self.format.shares else (*batch, outputs, inputs)
    constants = [weights.specs(constant, each) for constant in self.constants]
    names = [f.name for f in dataclasses.fields(self) if f.name not in ("codes", *self.static)]
    codes = PartitionSpec(*batch, outputs, inputs)
    return dataclasses.replace(self, codes=codes, **dict(zip(names, constants, strict=True)))


def lying(
  w: Num[Array | np.ndarray, "... D F"], table: bool, name: str, block: Size
) -> Float[Array, "... O I"]:
  """M of W, in float32 at least; its rows are to be cut into blocks.

  Raises:
    ValueError: when W is no matrix of floating-point numbers, or a block, which `name` calls it,
      does not divide the inputs.
  """
  if len(w.shape) < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
    raise ValueError(
      f"w is {w.dtype}{list(w.shape)}; allowed: matrices [..., D, F] of floating point"
    )
  inputs = w.shape[-1 if table else -2]
  if number(name, block, integer=True) < 1 or inputs % block:
    raise ValueError(
      f"{name} {block} does not divide the {inputs} inputs of w {tuple(w.shape)}; allowed: "
      f"{', '.join(str(size) for size in range(1, 257) if inputs % size == 0)}"
    )
  w = jnp.asarray(w).astype(numerics.wide(w.dtype))
  return w if table else jnp.matrix_transpose(w)
