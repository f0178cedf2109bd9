"""Products of groups of rows, whose kernels are compiled alone."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.kernels.flash_attention.cases import TOLERANCE
from effjax.kernels.grouped_matmul import fused
from effjax.kernels.grouped_matmul.sizes import Size
from effjax.kernels.quantized_matmul import Integers, Lying, Numbers
from scripts.checks import quantized
from scripts.checks.processes import Row

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
    codes, constants = matrices
    return Lying(_FORMATS[self.format], codes, constants, table)

  def draw(self, product: str, seed: int = 0) -> tuple[Any, ...]:
    """Random `arguments`: uneven groups, the first without rows, and NaN in the last rows."""
    rng = np.random.default_rng(seed)

    def of(like):
      if like.dtype in (jnp.int8, jnp.uint8):
        least = jnp.iinfo(like.dtype).min
        return jnp.asarray(rng.integers(least, least + 256, like.shape), like.dtype)
      return jnp.asarray(rng.normal(size=like.shape) / np.sqrt(self.width), like.dtype)

    *arrays, sizes = self.arguments(product)
    spare = min(3, self.rows - 1)
    shares = rng.dirichlet(np.full(self.groups - 1, 2.0))
    sizes = np.array([0, *rng.multinomial(self.rows - spare, shares)], np.int32)
    x, other = jax.tree.map(of, tuple(arrays))
    end = int(sizes.sum())
    spoil = lambda x: x.at[end:].set(jnp.nan)
    return spoil(x), spoil(other) if product == "sums" else other, jnp.asarray(sizes)

  def exact(self, product: str, x: Any, other: Any, sizes: Any) -> np.ndarray:
    """The result in float64, by a loop over groups."""
    wide = lambda x: np.asarray(x).astype(np.float64)
    ends = np.cumsum(sizes)
    spans = [slice(end - size, end) for end, size in zip(ends, np.asarray(sizes), strict=True)]
    x = wide(x)
    if product == "sums":
      other = wide(other)
      return np.stack([other[rows].T @ x[rows] for rows in spans])
    w = wide(self.lying(product, other).unpacked())
    y = np.zeros((self.rows, w.shape[2]))
    for rows, matrix in zip(spans, w, strict=True):
      y[rows] = x[rows] @ matrix
    return y

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


SMALL = ("float32-48-array-40-4-60", "bfloat16-128-nf4-72-4-60", "bfloat16-64-int8-40-4-60")
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


def program(
  case: Case, product: str, platform: str, interpret: bool = False, size: Size | None = None
) -> Callable[..., Any]:
  """A function of the case's arguments that runs one kernel, in the table's size by default."""
  kernels, options = fused.KERNELS[platform], {"interpret": interpret, "size": size}
  if product == "sums":
    return lambda dy, x, sizes: kernels.sums(x, dy, sizes, dy.dtype, **options)
  matrices = functools.partial(case.lying, product)
  return lambda x, w, sizes: kernels.products(x, matrices(w), sizes, **options)


def ragged(product: str) -> Callable[..., Any]:
  """The same of arrays by `jax.lax.ragged_dot`."""
  if product == "products":
    return lambda x, w, sizes: jax.lax.ragged_dot(x, w[0], sizes)
  if product == "turned":
    by_rows = lambda x, w, sizes: jax.lax.ragged_dot(x, w, sizes)
    turned = lambda x, w: jnp.zeros((len(x), w.shape[1]), x.dtype)
    return lambda dy, w, sizes: jax.vjp(lambda x: by_rows(x, w[0], sizes), turned(dy, w[0]))[1](dy)[
      0
    ]

  def sums(dy, x, sizes):
    w = jnp.zeros((len(sizes), x.shape[1], dy.shape[1]), x.dtype)
    return jax.vjp(lambda w: jax.lax.ragged_dot(x, w, sizes), w)[1](dy)[0]

  return sums


def values(case: Case, product: str, interpret: bool) -> Row:
  """How far a kernel of GPUs is from float64, relative to the norm; ‖difference‖ / ‖exact‖."""
  given = case.draw(product)
  with jax.default_matmul_precision("highest" if case.dtype == "float32" else None):
    found = jax.jit(program(case, product, "gpu", interpret))(*given)
  wanted = case.exact(product, *given)
  difference = np.asarray(found).astype(np.float64) - wanted
  error = float(np.linalg.norm(difference) / np.linalg.norm(wanted))
  limit = TOLERANCE[case.dtype]
  names = {"problem": f"{case}", "by": f"gpu {product}", "tolerance": limit, "largest": error}
  return names | {"good": error <= limit, "errors": {product: error}}
