"""Products of groups of rows, whose kernels are compiled alone."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effjax.kernels.grouped_matmul import fused
from effjax.kernels.quantized_matmul import Integers, Lying, Numbers
from scripts.checks import quantized

PRODUCTS = ("products", "turned", "sums")
_FORMATS = {"array": Numbers(), **quantized.FORMATS, "int8": Integers(1)}


@dataclasses.dataclass(frozen=True)
class Case:
  """Rows of a type in groups, a matrix for each: "bfloat16-2048-array-4096-8-8192".

  Attributes:
    width: inputs of a matrix.
  """

  dtype: str
  width: int
  format: str
  outputs: int
  groups: int
  rows: int

  @classmethod
  def of(cls, name: str) -> "Case":
    """The case of a name."""
    dtype, width, format, outputs, *numbers = name.split("-")
    return cls(dtype, int(width), format, int(outputs), *map(int, numbers))

  def __str__(self) -> str:
    return "-".join(map(str, dataclasses.astuple(self)))

  @property
  def products(self) -> tuple[str, ...]:
    """Those worth compiling: matrices that are packed do not train."""
    return PRODUCTS if self.format == "array" else PRODUCTS[:2]

  def arguments(self, product: str) -> tuple[Any, ...]:
    """Shapes and types of rows, what they are multiplied with, and the sizes of groups."""
    array = lambda *shape, dtype=self.dtype: jax.ShapeDtypeStruct(shape, dtype)
    wide, narrow = array(self.rows, self.outputs), array(self.rows, self.width)
    other = narrow if product == "sums" else self._matrices()
    return narrow if product == "products" else wide, other, array(self.groups, dtype=jnp.int32)

  def lying(self, product: str, matrices: Any) -> Lying:
    """The matrices as they lie, or as their transposes do."""
    table = (self.format in ("array", "int8")) == (product == "products")
    return Lying(_FORMATS[self.format], *matrices, table)

  def _matrices(self) -> tuple[Any, tuple[Any, ...]]:
    """Codes and constants: arrays and integers lie as inputs by outputs, others turned."""
    array = lambda *shape, dtype: jax.ShapeDtypeStruct((self.groups, *shape), dtype)
    if self.format == "array":
      return array(self.width, self.outputs, dtype=self.dtype), ()
    if self.format == "int8":
      codes = array(self.width, self.outputs, dtype=jnp.int8)
      return codes, (array(1, self.outputs, dtype=jnp.float32),)
    format = _FORMATS[self.format]
    blocks = self.width // format.block
    codes = array(self.outputs, blocks * format.size, dtype=jnp.uint8)
    return codes, (array(self.outputs, blocks, dtype=jnp.float32),)


CASES = tuple(
  str(Case(dtype, width, format, outputs, groups, rows))
  for dtype, format, (width, outputs, groups, rows) in itertools.product(
    ("bfloat16", "float32"),
    ("array", "nf4", "int8"),
    ((2048, 4096, 8, 8192), (576, 1536, 64, 2048), (2048, 4096, 8, 16)),
  )
  if dtype == "bfloat16" or format == "array"
)


def kernel(product: str) -> str:
  """What it is called where it is launched."""
  return "grouped_sums" if product == "sums" else "grouped_products"


def program(case: Case, product: str, platform: str) -> Callable[..., Any]:
  """A function of the case's arguments that runs one kernel."""
  kernels = fused.KERNELS[platform]
  if product == "sums":
    return lambda dy, x, sizes: kernels.sums(x, dy, sizes, dy.dtype)
  return lambda x, matrices, sizes: kernels.products(x, case.lying(product, matrices), sizes)
