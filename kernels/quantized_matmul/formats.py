"""How packed matrices lie in memory, and what their bytes stand for.

A packed matrix is M [..., O, I], outputs by inputs, so that a linear layer computes x Mᵀ. A row is
cut into blocks of consecutive inputs, and lies in memory as one run of bytes after another:

  codes      uint8 [..., O, n · size]   for n = I / block blocks of `size` bytes
  constants  [..., O, n]                each: what a block is scaled or moved by; none where the
                                        bytes of a block hold them
             [..., 1, k]                one for all of M, where a format `shares` them

A tile is any rows of M and any whole blocks of them: the same part of the codes and of constants
that are not shared. `Format.unpack` is all there is to know of the bytes: it makes numbers of a
tile, wherever it lies and however large it is. A constant may also be a `Weight` [..., O, n], whose
rows are those that `core.weights.lookup` gives.
"""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from effjax.core.typing import Array, Float, Integer, Shaped

# Quantiles of a normal distribution, and floating-point numbers of 4 bits over their largest.
NORMAL = (
  *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
  *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
  *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
  *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_MAGNITUDES = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
FLOATS = tuple(float(x) for x in (*_MAGNITUDES, *-_MAGNITUDES))


class Format(abc.ABC):
  """What the bytes of a packed matrix stand for: a value that is hashable, and equal to its like.

  Attributes:
    block: inputs that a block has.
    size: bytes of codes that a block has.
    shares: whether the constants belong to the whole matrix, and go whole with every tile.
  """

  block: int
  shares: ClassVar[bool] = False

  @property
  @abc.abstractmethod
  def size(self) -> int:
    """Bytes of codes that a block has."""

  @abc.abstractmethod
  def unpack(
    self, codes: Integer[Array, "... O N"], *constants: Shaped[Array, "... M K"]
  ) -> Float[Array, "... O I"]:
    """The numbers of a tile, in float32.

    Args:
      codes: uint8 [..., O, n · size].
      constants: [..., O, n] each, or [..., 1, k] where they are shared.
    """

  def planes(
    self, blocks: Integer[Array, "... size"], *constants: Shaped[Array, "... K"]
  ) -> tuple[Float[Array, "... w"], ...]:
    """The numbers of blocks in one or more planes: those that come about side by side.

    Args:
      blocks: uint8 [..., n, size] or [..., size].
      constants: one a block, or [1, k] where they are shared.
    """
    return (self.unpack(blocks, *constants),)

  def strands(self, x: Shaped[Array, "... block"]) -> tuple[Shaped[Array, "... w"], ...]:
    """The inputs of a block that the numbers of each plane belong to."""
    return (x,)

  def join(self, strands: Sequence[Shaped[Array, "... w"]]) -> Shaped[Array, "... block"]:
    """The inverse of `strands`."""
    return strands[0]


@dataclasses.dataclass(frozen=True)
class Nibbles(Format):
  """M = (table[code] − zero) · scale, two codes to a byte, the first in the high half.

  Constants are `scale`, and `zero` where there are zero points; both [..., O, n].

  Attributes:
    table: the 16 numbers that codes 0 … 15 stand for, before they are scaled.
    block: an even number of inputs.

  Example:
    >>> halves = Nibbles(tuple(range(16)), 4)
    >>> halves.unpack(jnp.array([[0x12, 0x3F]], jnp.uint8), jnp.array([[0.5]])).tolist()
    [[0.5, 1.0, 1.5, 7.5]]
  """

  table: tuple[int | float, ...]
  block: int

  @property
  def size(self) -> int:
    return self.block // 2

  def pack(self, codes: Integer[Array, "... I"]) -> Integer[Array, "... N"]:
    """uint8 [..., I / 2] of codes 0 … 15."""
    codes = codes.astype(jnp.uint8)
    return codes[..., ::2] << 4 | codes[..., 1::2]

  @property
  def first(self) -> int | float | None:
    """z where table[code] = code + z, so that numbers are computed and not looked up; else None."""
    steps = (self.table[0] + code for code in range(16))
    return self.table[0] if tuple(steps) == tuple(self.table) else None

  def value(self, bytes_: Integer[Array, "..."], shift: int) -> Float[Array, "..."]:
    """table[code] of the codes `shift` bits above the end of a byte, as every backend can."""
    if self.first is not None:
      return (bytes_ >> shift & 15).astype(jnp.float32) + jnp.float32(self.first)
    return select(self.table, bytes_, shift)

  def planes(self, blocks, *constants):
    scale, *zero = (c.astype(jnp.float32) for c in constants)
    bytes_ = blocks.astype(jnp.int32)
    values = self.value(bytes_, 4), self.value(bytes_, 0)
    return tuple((v - zero[0] if zero else v) * scale for v in values)

  def strands(self, x):
    return x[..., ::2], x[..., 1::2]

  def join(self, strands):
    return jnp.stack(strands, -1).reshape(*strands[0].shape[:-1], self.block)

  def unpack(self, codes, *constants):
    blocks = codes.reshape(*codes.shape[:-1], codes.shape[-1] // self.size, self.size)
    numbers = self.join(self.planes(blocks, *(c[..., None] for c in constants)))
    return numbers.reshape(*codes.shape[:-1], 2 * codes.shape[-1])


@dataclasses.dataclass(frozen=True)
class Integers(Format):
  """M = code, or code · scale, 8-bit integers as they lie, one an input.

  The constant, where there is one, is `scale`, [..., O, n], or [..., 1, I] for one an input.

  Attributes:
    block: any divisor of the inputs.

  Example:
    >>> Integers(2).unpack(jnp.array([[1, -2]], jnp.int8)).tolist()
    [[1.0, -2.0]]
    >>> Integers(2).unpack(jnp.array([[1, -2]], jnp.int8), jnp.array([[0.5]])).tolist()
    [[0.5, -1.0]]
  """

  block: int

  @property
  def size(self) -> int:
    return self.block

  def planes(self, blocks, *constants):
    numbers = blocks.astype(jnp.float32)
    return (numbers * constants[0].astype(jnp.float32) if constants else numbers,)

  def unpack(self, codes, *constants):
    each = lambda c: jnp.repeat(c, codes.shape[-1] // c.shape[-1], -1)
    return self.planes(codes, *map(each, constants))[0]


@dataclasses.dataclass(frozen=True)
class Numbers(Format):
  """M as it lies, in floating point, without constants.

  Attributes:
    block: any divisor of the inputs.

  Example:
    >>> Numbers(1).unpack(jnp.array([[0.5, 2.0]])).tolist()
    [[0.5, 2.0]]
  """

  block: int = 1

  @property
  def size(self) -> int:
    return self.block

  def planes(self, blocks, *constants):
    return (blocks,)

  def unpack(self, codes, *constants):
    return codes


def select(
  table: Sequence[Any], codes: Integer[Array, "..."], shift: int = 0
) -> Float[Array, "..."]:
  """table[code], a power of two of numbers: for each bit, the lowest first, one of two neighbours.

  Numbers are Python's, or arrays that broadcast against the codes.
  A code begins `shift` bits above the lowest; what is beyond it does not matter.

  Example:
    >>> select((5.0, 6.0, 7.0, 8.0), jnp.array([2, 0, 3])).tolist()
    [7.0, 5.0, 8.0]
  """
  values = [jnp.broadcast_to(jnp.asarray(x, jnp.float32), codes.shape) for x in table]
  for bit in range(len(table).bit_length() - 1):
    one = (codes & 1 << shift + bit) != 0
    values = [
      jnp.where(one, odd, even) for even, odd in zip(values[::2], values[1::2], strict=True)
    ]
  return values[0]


@dataclasses.dataclass(frozen=True)
class Indices(Format):
  """M = table[code], codes of `bits` bits one after another, the first in the highest bits.

  The constant is `table`, [..., 1, 2^bits], for all of M. Eight codes fill `bits` bytes.

  Attributes:
    bits: 1 … 8.
    block: a multiple of 8.

  Example:
    >>> two = Indices(2)  # 0b00011011 0b11110000
    >>> two.unpack(jnp.array([[0x1B, 0xF0]], jnp.uint8), jnp.array([[5.0, 6.0, 7.0, 8.0]])).tolist()
    [[5.0, 6.0, 7.0, 8.0, 8.0, 8.0, 5.0, 5.0]]
  """

  bits: int
  block: int = 8
  shares: ClassVar[bool] = True

  @property
  def size(self) -> int:
    return self.block // 8 * self.bits

  @property
  def apart(self) -> int:
    """The fewest codes that fill whole bytes."""
    return 8 // math.gcd(8, self.bits)

  def pack(self, codes: Integer[Array, "... I"]) -> Integer[Array, "... N"]:
    """uint8 [..., I · bits / 8] of codes 0 … 2^bits − 1."""
    each = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 8, 8).astype(jnp.uint32)
    held = []
    for byte in range(self.bits):
      # Code i ends `shift` bits above the end of this byte; what lies outside is cut off.
      shifts = (8 * (byte + 1) - self.bits * (i + 1) for i in range(8))
      parts = (_shifted(each[..., i], shift) & 255 for i, shift in enumerate(shifts))
      held.append(sum(parts, jnp.zeros((), jnp.uint32)))
    packed = jnp.stack(held, -1).astype(jnp.uint8)
    return packed.reshape(*codes.shape[:-1], codes.shape[-1] // 8 * self.bits)

  def codes(self, packed: Integer[Array, "... N"]) -> Integer[Array, "... I"]:
    """The inverse of `pack`, int32."""
    inputs = packed.shape[-1] // self.bits * 8
    return jnp.stack(self._codes(packed), -1).reshape(*packed.shape[:-1], inputs)

  def planes(self, blocks, *constants):
    (table,) = constants
    table = table.astype(jnp.float32).reshape(-1)
    few = self.bits <= 4
    look = (lambda codes: select(list(table), codes)) if few else (lambda codes: table[codes])
    return tuple(map(look, self._codes(blocks)))

  def strands(self, x):
    return tuple(x[..., i :: self.apart] for i in range(self.apart))

  def join(self, strands):
    return jnp.stack(strands, -1).reshape(*strands[0].shape[:-1], self.block)

  def unpack(self, codes, *constants):
    (table,) = constants
    found = self.codes(codes)
    shape, found = found.shape, found.reshape(*table.shape[:-2], 1, -1)
    return jnp.take_along_axis(table.astype(jnp.float32), found, -1).reshape(shape)

  def _codes(self, packed: Integer[Array, "... N"]) -> list[Integer[Array, "... n"]]:
    """The codes of each `apart` that follow one another: all first ones, all second ones, …"""
    size = self.apart * self.bits // 8
    held = packed.astype(jnp.int32)
    bytes_ = [held[..., i::size] for i in range(size)]
    found = []
    for i in range(self.apart):
      byte, within = divmod(self.bits * i, 8)
      spare = 8 - within - self.bits
      pair = bytes_[byte] if spare >= 0 else bytes_[byte] << 8 | bytes_[byte + 1]
      found.append(pair >> spare % 8 & (2**self.bits - 1))
    return found


def _shifted(x: Array, by: int) -> Array:
  return x << by if by >= 0 else x >> -by
