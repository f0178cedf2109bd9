"""Matrices as they lie in memory, for kernels that make numbers of a tile at a time."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core.typing import Array, Float, Shaped
from effjax.core.weights import Weight
from effjax.kernels.quantized_matmul.formats import Format, Numbers


@dataclasses.dataclass(frozen=True)
class Lying:
  """W = Mᵀ, or M itself as a `table` has it, for matrices M [E, O, I].

  Attributes:
    format: what the codes stand for.
    codes: [E, O, n · format.size].
    constants: as `format.unpack` takes them.
    table: whether W is M itself.
  """

  format: Format
  codes: Shaped[Array, "E O N"]
  constants: tuple[Any, ...] = ()
  table: bool = False

  @property
  def shape(self) -> tuple[int, int, int]:
    """That of W."""
    groups, outputs, length = self.codes.shape
    inputs = length // self.format.size * self.format.block
    return (groups, outputs, inputs) if self.table else (groups, inputs, outputs)

  @property
  def planes(self) -> int:
    """How many the numbers of a tile come about in."""
    block = jax.ShapeDtypeStruct((self.format.block,), jnp.float32)
    return len(jax.eval_shape(self.format.strands, block))

  def strands(self, x: Float[Array, "M I"]) -> tuple[Float[Array, "M N"], ...]:
    """The inputs of each plane."""
    blocks = x.reshape(len(x), -1, self.format.block)
    return tuple(part.reshape(len(x), -1) for part in self.format.strands(blocks))

  def joined(self, strands: Sequence[Float[Array, "M N"]]) -> Float[Array, "M I"]:
    """The inverse of `strands`."""
    blocks = [part.reshape(len(part), -1, self.format.size) for part in strands]
    return self.format.join(blocks).reshape(len(strands[0]), -1)

  def unpacked(self) -> Float[Array, "E D F"]:
    """W."""
    m = self.format.unpack(self.codes, *self.constants)
    return m if self.table else jnp.matrix_transpose(m)


def as_it_lies(w: Any) -> Lying | None:
  """How an array [E, D, F] or a `Weight` lies; None for one of which no format knows.

  Example:
    >>> as_it_lies(jnp.ones((2, 3, 4))).shape
    (2, 3, 4)
  """
  return getattr(w, "lying", None) if isinstance(w, Weight) else Lying(Numbers(), w, table=True)
