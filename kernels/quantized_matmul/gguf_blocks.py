"""The blocks of GGUF files, as ggml's `ggml-common.h` lays them out; a block holds its constants.

d, m are float16, q the codes, s and t small integers that scale groups of a block:

  Q8_0  32:  d, 32 × int8                       w = d·q
  Q4_0  32:  d, 16 bytes                        w = d·(q − 8)
  Q4_1  32:  d, m, 16 bytes                     w = d·q + m
  Q5_0  32:  d, 32 fifth bits, 16 bytes         w = d·(q − 16)
  Q5_1  32:  d, m, 32 fifth bits, 16 bytes      w = d·q + m
  Q4_K  256: d, m, 8 × (s, t) in 12 bytes, 128  w = d·s·q − m·t, groups of 32
  Q5_K  256: d, m, (s, t), 256 fifth bits, 128  w = d·s·q − m·t, groups of 32
  Q6_K  256: 128 bytes, 64 of upper bits, 16 × int8 s, d   w = d·s·(q − 32), groups of 16

Of a byte with two codes the low half comes first, and the high half half a run later: 16 codes in a
block of 32, 32 in the larger ones, 64 in Q6_K.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from effjax.core.typing import Array, Float, Integer
from effjax.kernels.quantized_matmul.formats import Format

SIZES = {  # inputs of a block, and its bytes
  "Q8_0": (32, 34),
  "Q4_0": (32, 18),
  "Q4_1": (32, 20),
  "Q5_0": (32, 22),
  "Q5_1": (32, 24),
  "Q4_K": (256, 144),
  "Q5_K": (256, 176),
  "Q6_K": (256, 210),
}


@dataclasses.dataclass(frozen=True)
class Blocks(Format):
  """M in blocks of GGUF's type `kind`, one of `SIZES`, which hold their constants.

  Example:
    >>> ones = jnp.array([[0, 0x38] + [2] * 32], jnp.uint8)  # 0.5, and 32 times 2
    >>> Blocks("Q8_0").unpack(ones)[0, :3].tolist()
    [1.0, 1.0, 1.0]
  """

  kind: str

  @property
  def block(self) -> int:  # type: ignore[override]
    return SIZES[self.kind][0]

  @property
  def size(self) -> int:
    return SIZES[self.kind][1]

  def unpack(self, codes, *constants):
    n = codes.shape[-1] // self.size
    blocks = codes.reshape(*codes.shape[:-1], n, self.size)
    values = _numbers(self.kind, blocks)
    return values.reshape(*codes.shape[:-1], n * self.block)


def _numbers(kind: str, blocks: Integer[Array, "... n size"]) -> Float[Array, "... n block"]:
  if kind == "Q6_K":
    return _q6_k(blocks)
  if kind in ("Q4_K", "Q5_K"):
    return _q45_k(blocks, fifth=kind == "Q5_K")
  d, rest = _half(blocks[..., :2]), blocks[..., 2:]
  if kind == "Q8_0":
    return d * _signed(rest)
  codes = _halves(rest[..., -16:], 16)
  if kind.startswith("Q5"):
    bits = rest[..., -20:-16, None] >> jnp.arange(8, dtype=jnp.uint8).reshape(
      (1,) * rest.ndim + (8,)
    )
    codes = codes | (bits.reshape(codes.shape) & 1) << 4
  if kind.endswith("1"):
    return d * codes.astype(jnp.float32) + _half(rest[..., :2])
  return d * (codes.astype(jnp.float32) - (16.0 if kind == "Q5_0" else 8.0))


def _q45_k(blocks: Array, fifth: bool) -> Array:
  d, m, packed = _half(blocks[..., :2]), _half(blocks[..., 2:4]), blocks[..., 4:16]
  low, high, both = packed[..., :4], packed[..., 4:8], packed[..., 8:]
  s = jnp.concatenate([low & 63, both & 15 | low >> 2 & 48], -1).astype(jnp.float32)
  t = jnp.concatenate([high & 63, both >> 4 | high >> 2 & 48], -1).astype(jnp.float32)
  codes = _halves(blocks[..., -128:], 32)
  if fifth:
    codes = codes | _planes(blocks[..., 16:48], 1) << 4
  groups = codes.astype(jnp.float32).reshape(*codes.shape[:-1], 8, 32)
  values = (d * s)[..., None] * groups - (m * t)[..., None]
  return values.reshape(codes.shape)


def _q6_k(blocks: Array) -> Array:
  low, upper = blocks[..., :128], blocks[..., 128:192]
  s, d = _signed(blocks[..., 192:208]), _half(blocks[..., 208:])
  upper = jnp.concatenate([_planes(upper[..., :32], 2), _planes(upper[..., 32:], 2)], -1)
  codes = (_halves(low, 64) | upper << 4).astype(jnp.float32) - 32.0
  values = (d * s)[..., None] * codes.reshape(*codes.shape[:-1], 16, 16)
  return values.reshape(codes.shape)


def _half(bytes_: Integer[Array, "... 2"]) -> Float[Array, "... 1"]:
  """A float16 of two bytes."""
  return lax.bitcast_convert_type(bytes_, jnp.float16)[..., None].astype(jnp.float32)


def _signed(bytes_: Array) -> Array:
  return lax.bitcast_convert_type(bytes_, jnp.int8).astype(jnp.float32)


def _halves(bytes_: Array, run: int) -> Array:
  """Codes of 4 bits: of each `run` bytes the low halves, then the high ones."""
  runs = bytes_.reshape(*bytes_.shape[:-1], -1, run)
  both = jnp.stack([runs & 15, runs >> 4], -2)
  return both.reshape(*bytes_.shape[:-1], 2 * bytes_.shape[-1])


def _planes(bytes_: Array, bits: int) -> Array:
  """Codes of `bits` bits: the lowest of all bytes, then the next."""
  planes = [bytes_ >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
  return jnp.concatenate(planes, -1)
