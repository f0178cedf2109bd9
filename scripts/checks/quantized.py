"""Products with packed matrices, whose kernels are compiled alone."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effjax.kernels.quantized_matmul import NORMAL, Format, Integers, Nibbles
from effjax.kernels.quantized_matmul.fused import KERNELS

PRODUCTS = ("outputs", "inputs")
FORMATS: dict[str, Format] = {
  "nf4": Nibbles(NORMAL, 64),
  "int4": Nibbles(tuple(range(-8, 8)), 64),
  "int8": Integers(64),
}
_PLATFORMS = {"gpu": KERNELS["cuda"], "tpu": KERNELS["tpu"]}


@dataclasses.dataclass(frozen=True)
class Case:
  """Rows of a type by a matrix of a format: "bfloat16-576-nf4-1536-16".

  Attributes:
    width: inputs of the matrix.
  """

  dtype: str
  width: int
  format: str
  outputs: int
  rows: int

  @classmethod
  def of(cls, name: str) -> "Case":
    """The case of a name."""
    dtype, width, format, outputs, rows = name.split("-")
    return cls(dtype, int(width), format, int(outputs), int(rows))

  def __str__(self) -> str:
    return f"{self.dtype}-{self.width}-{self.format}-{self.outputs}-{self.rows}"

  def arguments(self, product: str) -> tuple[Any, ...]:
    """Shapes and types of rows, codes and constants."""
    format = FORMATS[self.format]
    blocks = self.width // format.block
    type = jnp.int8 if isinstance(format, Integers) else jnp.uint8
    codes = jax.ShapeDtypeStruct((self.outputs, blocks * format.size), type)
    scale = jax.ShapeDtypeStruct((self.outputs, blocks), jnp.float32)
    length = self.width if product == "outputs" else self.outputs
    rows = jax.ShapeDtypeStruct((self.rows, length), self.dtype)
    return rows, codes, () if isinstance(format, Integers) else (scale,)


CASES = tuple(
  str(Case("bfloat16", width, format, outputs, rows))
  for format, (width, outputs), rows in itertools.product(
    FORMATS, ((576, 1536), (2048, 8192)), (1, 16, 256)
  )
)


def kernel(product: str) -> str:
  """What it is called where it is launched."""
  return f"quantized_{product}"


def program(case: Case, product: str, platform: str) -> Callable[..., Any]:
  """A function of the case's arguments that runs one kernel."""
  run = getattr(_PLATFORMS[platform], product)
  return lambda x, codes, constants: run(x, FORMATS[case.format], codes, constants)
