"""Uniform quantisation: integers times a scale, one scale a tensor, row, channel or group.

A granularity is a tile of the matrix [D, F] that shares one scale; everything here is the same
arithmetic over different tiles. Background: Nagel et al., "A White Paper on Neural Network
Quantization", arXiv 2106.08295, section 2.
"""

import functools

import jax
import jax.numpy as jnp

from effjax.core.known import number
from effjax.core.typing import Array, Float, Int, Integer, Size

GRANULARITIES = ("tensor", "row", "channel", "group")
# Outside a program too, a large matrix is gone through once, without copies of it in between.
_compiled = functools.partial(jax.jit, static_argnames=("bits", "granularity", "group"))


@_compiled
def symmetric(
  w: Float[Array, "... D F"], *, bits: Size = 8, granularity: str = "channel", group: Size = 64
) -> tuple[Int[Array, "... D F"], Float[Array, "... M N"]]:
  """q = round(w / s), s = max|w| / (2^(bits−1) − 1) over each tile; |w − q·s| ≤ s/2.

  Args:
    w: matrices [..., D, F]; leading axes are a batch.
    bits: 2 … 8.
    granularity: what shares a scale: "tensor" (the matrix), "row" (w[d, :]), "channel" (an output
      channel w[:, f]) or "group" (`group` consecutive rows of an output channel).
    group: rows a group has.

  Returns:
    q, int8 [..., D, F], and the scales [..., M, N], one a tile, in the type of `w`.

  Raises:
    ValueError: for bits, a granularity or a group that is not allowed.

  Example:
    >>> q, scale = symmetric(jnp.array([[1.0, 10.0], [-2.0, 0.0]]))
    >>> q.tolist(), scale.shape
    ([[64, 127], [-127, 0]], (1, 2))
  """
  tiles = _tiles(w, bits, granularity, group)
  top = 2 ** (bits - 1) - 1
  scale = _positive(jnp.abs(tiles).max((-3, -1), keepdims=True) / top, w.dtype)
  q = jnp.clip(jnp.round(tiles / scale.astype(jnp.float32)), -top, top)
  return q.astype(jnp.int8).reshape(w.shape), scale[..., 0, :, 0]


@_compiled
def affine(
  w: Float[Array, "... D F"], *, bits: Size = 8, granularity: str = "channel", group: Size = 64
) -> tuple[Integer[Array, "... D F"], Float[Array, "... M N"], Int[Array, "... M N"]]:
  """q = round(w / s) + z, s = (max − min) / (2^bits − 1), z = −round(min / s); |w − (q−z)s| ≤ s/2.

  The range is widened to contain 0, which is thereby exact. Arguments as for `symmetric`.

  Returns:
    q, uint8 [..., D, F]; the scales and the integer zero points, [..., M, N] each.

  Raises:
    ValueError: as `symmetric`.

  Example:
    >>> q, scale, zero = affine(jnp.array([[0.0], [255.0]]))
    >>> q.tolist(), scale.tolist(), zero.tolist()
    ([[0], [255]], [[1.0]], [[0]])
  """
  tiles = _tiles(w, bits, granularity, group)
  top = 2**bits - 1
  low = jnp.minimum(tiles.min((-3, -1), keepdims=True), 0)
  high = jnp.maximum(tiles.max((-3, -1), keepdims=True), 0)
  scale = _positive((high - low) / top, w.dtype)
  zero = jnp.round(-low / scale.astype(jnp.float32))
  q = jnp.clip(jnp.round(tiles / scale.astype(jnp.float32)) + zero, 0, top)
  zero = zero[..., 0, :, 0].astype(jnp.int32)
  return q.astype(jnp.uint8).reshape(w.shape), scale[..., 0, :, 0], zero


@jax.jit
def restore(
  q: Integer[Array, "... D F"],
  scale: Float[Array, "... M N"],
  zero: Int[Array, "... M N"] | None = None,
) -> Float[Array, "... D F"]:
  """(q − z)·s, the inverse of `symmetric` (without `zero`) and `affine`, in the scale's type.

  Example:
    >>> restore(jnp.array([[3, 5]]), jnp.array([[2.0]]), jnp.array([[1]])).tolist()
    [[4.0, 8.0]]
  """
  centred = q.astype(jnp.int32) if zero is None else q.astype(jnp.int32) - _spread(zero, q.shape)
  wide = centred.astype(jnp.float32) * _spread(scale, q.shape).astype(jnp.float32)
  return wide.astype(scale.dtype)


def _spread(values: Array, shape: tuple[int, ...]) -> Array:
  """One value a tile, repeated over its tile."""
  for axis in (-2, -1):
    values = jnp.repeat(values, shape[axis] // values.shape[axis], axis=axis)
  return values


def _tiles(w: Array, bits: Size, granularity: str, group: Size) -> Float[Array, "... m d n f"]:
  """`w` in float32, cut into [m, d, n, f]: m × n tiles of d × f."""
  if w.ndim < 2:
    raise ValueError(f"w has shape {w.shape}; allowed: matrices [..., D, F]")
  number("bits", bits, integer=True, least=2, most=8)
  D, F = w.shape[-2:]
  sizes = {"tensor": (D, F), "row": (1, F), "channel": (D, 1), "group": (group, 1)}
  if granularity not in sizes:
    raise ValueError(f"granularity {granularity!r}; allowed: {', '.join(GRANULARITIES)}")
  number("group", group, integer=True)
  d, f = sizes[granularity]
  if d < 1 or D % d:
    raise ValueError(f"group {group} does not divide the {D} rows of w {w.shape}")
  return w.astype(jnp.float32).reshape(*w.shape[:-2], D // d, d, F // f, f)


def _positive(scale: Array, dtype) -> Array:
  """The scale in its final type, 1 where everything is zero."""
  scale = scale.astype(dtype)
  return jnp.where(scale == 0, jnp.ones_like(scale), scale)
