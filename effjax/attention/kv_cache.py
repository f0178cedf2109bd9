"""Keys and values of the tokens seen so far, by position: as floats, or as 8-bit integers."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from effjax.core import numerics
from effjax.core.typing import Array, Bool, Dim, DTypeLike, Float, Int, Shaped


@struct.dataclass
class Int8Rows:
  """x ≈ q · scale with scale = max |x| / 127 over the last axis: one a token and head.

  The error is at most scale / 2 an entry, beside the rounding of float32. A row that holds NaN or
  infinity is NaN, and no other. It takes 1 + 4 / H bytes an entry.

  Attributes:
    q: int8, 0 where nothing was written.
    scale: float32.

  Example:
    >>> rows = Int8Rows.of(jnp.array([[1.0, -2.0], [0.0, 0.0]]))
    >>> rows.q.tolist(), (127 * rows.scale).tolist(), rows.astype(jnp.float32).round(2).tolist()
    ([[64, -127], [0, 0]], [[2.0], [0.0]], [[1.0..., -2.0], [0.0, 0.0]])
  """

  q: Int[Array, "... H"]
  scale: Float[Array, "... 1"]

  @classmethod
  def of(cls, x: Float[Array, "... H"]) -> "Int8Rows":
    """The nearest ones of x."""
    q, scale = numerics.rounded(x)
    return cls(q, scale.astype(jnp.float32))

  def astype(self, dtype: DTypeLike) -> Float[Array, "... H"]:
    """What they stand for, in a type of floats."""
    wide = numerics.wide(dtype)
    return (self.q.astype(wide) * self.scale.astype(wide)).astype(dtype)


Rows = Array | Int8Rows
Kept = TypeVar("Kept", bound=Rows)


def empty(shape: tuple[Dim, ...], dtype: DTypeLike) -> Rows:
  """Zeros [B, S, ..., H] in which `put` keeps numbers as `dtype`.

  Args:
    dtype: a type of floats, or int8 for `Int8Rows`.

  Raises:
    ValueError: for another type.
  """
  dtype = jnp.dtype(dtype)
  if dtype == jnp.int8:
    return Int8Rows(jnp.zeros(shape, dtype), jnp.zeros((*shape[:-1], 1), jnp.float32))
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype={dtype.name} of a cache; allowed: types of floats, and int8")
  return jnp.zeros(shape, dtype)


def put(rows: Kept, new: Shaped[Array, "B T ..."], slots: Int[Array, "B T"]) -> Kept:
  """`rows` [B, S, ...] with `new` in `slots`, as they keep it; none past their end."""
  row = jnp.arange(slots.shape[0])[:, None]
  each = lambda old, new: old.at[row, slots].set(new.astype(old.dtype), mode="drop")
  return jax.tree.map(each, rows, Int8Rows.of(new) if isinstance(rows, Int8Rows) else new)


@struct.dataclass
class KVCache:
  """Keys and values of the tokens seen so far; the token at position p lies in slot p.

  Attributes:
    key, value: [B, S, K, H], zeros where nothing was written.
    written: the slots that hold a token; no other is seen, whatever the mask shows.
  """

  key: Float[Array, "... B S K H"] | Int8Rows
  value: Float[Array, "... B S K H"] | Int8Rows
  written: Bool[Array, "... B S"]

  @property
  def ends(self) -> Int[Array, "... B"]:
    """The slot after the last that holds a token, where a row goes on."""
    after = jnp.arange(1, self.written.shape[-1] + 1, dtype=jnp.int32)
    return jnp.where(self.written, numerics.expand(after, self.written.ndim), 0).max(-1)

  def write(self, key: Array, value: Array, slots: Array) -> "KVCache":
    """The cache with `key` and `value` [B, T, K, H] in `slots` [B, T]; none past its end.

    What a row held in the first of them and beyond is forgotten.
    """
    length = self.written.shape[1]
    before = jnp.arange(length)[None] < slots.min(1, keepdims=True, initial=length)
    written = put(self.written & before, jnp.ones(slots.shape, bool), slots)
    return KVCache(put(self.key, key, slots), put(self.value, value, slots), written)
