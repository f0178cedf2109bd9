"""Numbers in 8 bits whose exponent takes as many of them as it needs, in blocks of 256.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, section 2.2. With
the mean taken off first it is what QLoRA quantises the scales of its blocks with (arXiv 2305.14314,
section 3), and bitsandbytes' to the bit.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import weights
from effjax.core.register import register
from effjax.core.typing import Array, Float, Int, Integer, PyTree
from effjax.core.weights import Weight
from effjax.quant.nearest import nearest

BLOCK = 256


@functools.cache
def signed_map() -> np.ndarray:
  """The 256 numbers: 0, 1, and ±10^(i−6) · means of 2^i even parts of 0.1 … 1, for i = 0 … 6.

  −1 is none of them.
  """
  parts = []
  for i in range(7):
    means = _middles(2**i) * np.float32(10.0 ** (i - 6))
    parts += [means, -means]
  return np.sort(np.concatenate([*parts, [0, 1]]).astype(np.float32))


def _middles(count: int) -> np.ndarray:
  """The middles of `count` even parts of 0.1 … 1, their bounds rounded to float32."""
  first, last = np.float32(0.1), np.float32(1)
  step, steps = float((last - first) / np.float32(count)), np.arange(count + 1)
  up, down = float(first) + step * steps, float(last) - step * steps[::-1]
  bounds = np.where(steps < (count + 1) // 2, up, down).astype(np.float32)
  return (bounds[:-1] + bounds[1:]) / np.float32(2)


@register(static=("dtype",), kind="quantised")
class Dynamic8(Weight):
  """W = offset + map[code] · coarse, coarse = max |W − offset| of 256 entries one after another.

  A byte an entry, and 1/64 of one for `coarse`. It stands for the scales of packed weights.

  Invariants:
    codes: uint8 [..., D, F].
    coarse: float32 [..., 1, ⌈D·F / 256⌉]; blocks go on from row to row, and the last may be short.
    offset: float32 [..., 1, 1], the mean of W.
  """

  codes: PyTree
  coarse: PyTree
  offset: PyTree
  dtype: Any = dataclasses.field(default=np.dtype(np.float32), kw_only=True)

  @classmethod
  def quantize(cls, w: Float[Array, "... D F"]) -> "Dynamic8":
    """The nearest one of `w`.

    Example:
      >>> w = Dynamic8.quantize(jnp.array([[1.0, 3.0, 2.0]]))
      >>> w.offset.tolist(), w.coarse.tolist(), w.materialize().round(1).tolist()
      ([[2.0]], [[1.0]], [[1.0, 3.0, 2.0]])
    """
    codes, coarse, offset = _encode(w)
    return cls(codes, coarse, offset, dtype=jax.typeof(w).dtype)

  def check(self) -> None:
    *batch, D, F = self.codes.shape
    wanted = {"coarse": (*batch, 1, -(-D * F // BLOCK)), "offset": (*batch, 1, 1)}
    for name, allowed in wanted.items():
      given = tuple(getattr(self, name).shape)
      if given != allowed:
        raise ValueError(f"Dynamic8: {name} has shape {given}; allowed: {allowed}")

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.codes.shape)

  def materialize(self) -> Array:
    D, F = self.shape[-2:]
    coarse = jnp.repeat(self.coarse, BLOCK, axis=-1)[..., 0, : D * F].reshape(self.shape)
    return self._numbers(self.codes, coarse)

  def lookup(self, indices: Int[Array, "..."]) -> Float[Array, "... F"]:
    F = self.shape[-1]
    entries = indices[..., None] * F + jnp.arange(F).reshape((1,) * indices.ndim + (F,))
    return self._numbers(weights.lookup(self.codes, indices), self.coarse[0][entries // BLOCK])

  def _numbers(self, codes: Array, coarse: Array) -> Array:
    shares = jnp.asarray(signed_map())[codes.astype(jnp.int32)] * coarse
    trailing = (1,) * (shares.ndim - self.offset.ndim + 2)
    offset = self.offset.reshape(*self.offset.shape[:-2], *trailing)
    return (shares + offset).astype(self.dtype)


@jax.jit
def _encode(
  w: Float[Array, "... D F"],
) -> tuple[Integer[Array, "... D F"], Float[Array, "... 1 K"], Float[Array, "... 1 1"]]:
  *batch, D, F = w.shape
  w = w.astype(jnp.float32)
  # By a number that is known, XLA would multiply with its reciprocal, which is rounded.
  count = jax.lax.optimization_barrier(jnp.float32(max(1, D * F)))
  offset = w.sum((-2, -1), keepdims=True) / count
  n = math.ceil(D * F / BLOCK)
  flat = (w - offset).reshape(*batch, D * F)
  flat = jnp.pad(flat, [(0, 0)] * len(batch) + [(0, n * BLOCK - D * F)])
  blocks = flat.reshape(*batch, n, BLOCK)
  coarse = jnp.abs(blocks).max(-1)
  shares = blocks * (1 / jnp.maximum(coarse, jnp.finfo(jnp.float32).tiny))[..., None]
  codes = nearest(shares, signed_map()).astype(jnp.uint8)
  codes = codes.reshape(*batch, n * BLOCK)[..., : D * F].reshape(w.shape)
  return codes, coarse[..., None, :], offset
