"""Uniform quantisation: integers times a scale, one scale a tensor, row, channel or group.

A granularity is a tile of the matrix [D, F] that shares one scale; everything here is the same
arithmetic over different tiles. Background: Nagel et al., "A White Paper on Neural Network
Quantization", arXiv 2106.08295, section 2.

A scale is rounded up to its type, so that the bound of s/2 holds in each. The least there is, L, is
2^−125 in float32 and bfloat16, whose numbers below 2^−126 may count as 0, and 2^−24 in float16. A
tile below L/2 would be lost, and has the scale NaN instead, as one has that holds NaN or infinity.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.known import number
from effjax.core.numerics import wide
from effjax.core.typing import Array, DTypeLike, Float, Int, Integer, Key, Num, Size

GRANULARITIES = ("tensor", "row", "channel", "group")
# Outside a program too, a large matrix is gone through once, without copies of it in between.
_STATIC = ("bits", "granularity", "group", "scale_dtype")
_compiled = functools.partial(jax.jit, static_argnames=_STATIC)


@_compiled
def symmetric(
  w: Num[Array | np.ndarray, "... D F"],
  *,
  bits: Size = 8,
  granularity: str = "channel",
  group: Size = 64,
  scale_dtype: DTypeLike = jnp.float32,
  key: Key | None = None,
) -> tuple[Int[Array, "... D F"], Float[Array, "... M N"]]:
  """q = round(w / s), s = max|w| / (2^(bits−1) − 1) over each tile; |w − q·s| ≤ s/2.

  Args:
    w: matrices [..., D, F]; leading axes are a batch.
    bits: 2 … 8.
    granularity: what shares a scale: "tensor" (the matrix), "row" (w[d, :]), "channel" (an output
      channel w[:, f]) or "group" (`group` consecutive rows of an output channel).
    group: rows a group has.
    scale_dtype: type of the scales. A 16-bit one costs accuracy: rounded up, s is larger by up to
      2^−7 of itself in bfloat16, and by 2^−10 of itself and 2^−24 in float16, which has no scale
      beyond 65504.
    key: rounds at random, up with the probability of what is left over (stochastic rounding): what
      is restored is w on average, and off by less than s. None rounds to the nearest, halves to
      even.

  Returns:
    q, int8 [..., D, F], and the scales [..., M, N], one a tile.

  Raises:
    ValueError: for bits, a granularity, a group or types that are not allowed.

  Example:
    >>> q, scale = symmetric(jnp.array([[1.0, 10.0], [-2.0, 0.0]]))
    >>> q.tolist(), scale.shape
    ([[64, 127], [-127, 0]], (1, 2))
  """
  tiles, factor = _tiles(jnp.asarray(w), bits, granularity, group)
  top = 2 ** (bits - 1) - 1
  peak = _peak(tiles)
  scale = _scale(peak / top, peak, factor, scale_dtype)
  q = jnp.clip(_rounded(tiles, factor, scale, key), -top, top)
  return q.astype(jnp.int8).reshape(w.shape), scale[..., 0, :, 0]


@_compiled
def affine(
  w: Num[Array | np.ndarray, "... D F"],
  *,
  bits: Size = 8,
  granularity: str = "channel",
  group: Size = 64,
  scale_dtype: DTypeLike = jnp.float32,
  key: Key | None = None,
) -> tuple[Integer[Array, "... D F"], Float[Array, "... M N"], Int[Array, "... M N"]]:
  """q = round(w / s) + z, s = (max − min) / (2^bits − 1), z = −round(min / s); |w − (q−z)s| ≤ s/2.

  The range is widened to contain 0, which is thereby exact, and with a key by a step, so that both
  ends can be rounded either way: s = (max − min) / (2^bits − 2). Arguments as for `symmetric`.

  Returns:
    q, uint8 [..., D, F]; the scales and the integer zero points, [..., M, N] each.

  Raises:
    ValueError: as `symmetric`.

  Example:
    >>> q, scale, zero = affine(jnp.array([[0.0], [255.0]]))
    >>> q.tolist(), scale.tolist(), zero.tolist()
    ([[0], [255]], [[1.0]], [[0]])
  """
  tiles, factor = _tiles(jnp.asarray(w), bits, granularity, group)
  top = 2**bits - 1
  low = tiles.min((-3, -1), keepdims=True, initial=0)
  high = tiles.max((-3, -1), keepdims=True, initial=0)
  span = top if key is None else top - 1
  scale = _scale((high - low) / span, jnp.maximum(high, -low), factor, scale_dtype)
  zero = (jnp.round if key is None else jnp.ceil)(_steps(-low, factor, scale))
  q = jnp.clip(_rounded(tiles, factor, scale, key) + zero, 0, top)
  zero = zero[..., 0, :, 0].astype(jnp.int32)
  return q.astype(jnp.uint8).reshape(w.shape), scale[..., 0, :, 0], zero


@functools.partial(jax.jit, static_argnames="dtype")
def restore(
  q: Integer[Array, "... D F"],
  scale: Float[Array, "... M N"],
  zero: Int[Array, "... M N"] | None = None,
  *,
  dtype: DTypeLike | None = None,
) -> Float[Array, "... D F"]:
  """(q − z)·s, the inverse of `symmetric` (without `zero`) and `affine`.

  Args:
    q, scale, zero: what those give.
    dtype: type of the result; None is that of the scale.

  Example:
    >>> restore(jnp.array([[3, 5]]), jnp.array([[2.0]]), jnp.array([[1]])).tolist()
    [[4.0, 8.0]]
  """
  centred = q.astype(jnp.int32) if zero is None else q.astype(jnp.int32) - _spread(zero, q.shape)
  computed = wide(scale.dtype)
  values = centred.astype(computed) * _spread(scale, q.shape).astype(computed)
  return values.astype(dtype or scale.dtype)


def check_scales(scale: Float[Array, "..."]) -> None:
  """Refuses scales that are not finite, where they are known.

  Raises:
    ValueError: for scales of NaN or infinity.
  """
  if not isinstance(scale, jax.core.Tracer) and not jnp.isfinite(scale).all():
    raise ValueError(
      f"w has NaN, infinity or what no scale in {scale.dtype} is for; allowed: finite numbers, "
      "and scale_dtype=float32 for very small or large ones"
    )


def _spread(values: Array, shape: tuple[int, ...]) -> Array:
  """One value a tile, repeated over its tile."""
  for axis in (-2, -1):
    values = jnp.repeat(values, shape[axis] // max(1, values.shape[axis]), axis=axis)
  return values


def _tiles(w: Array, bits: Size, granularity: str, group: Size) -> tuple[Array, Array]:
  """`w` in float32 at least, cut into [..., m, d, n, f]: m × n tiles of d × f.

  Each is multiplied by the power of two [..., m, 1, n, 1] that comes with it, so that neither what
  is computed with it nor the reciprocal of its scale leaves the normal numbers.
  """
  if w.ndim < 2:
    raise ValueError(f"w has shape {w.shape}; allowed: matrices [..., D, F]")
  if not jnp.issubdtype(w.dtype, jnp.floating):
    raise ValueError(f"w has type {w.dtype}; allowed: floating point")
  number("bits", bits, integer=True, least=2, most=8)
  number("group", group, integer=True)
  D, F = w.shape[-2:]
  counts = {"tensor": (1, 1), "row": (D, 1), "channel": (1, F)}
  if granularity == "group":
    if group < 1 or D % group:
      raise ValueError(f"group {group} does not divide the {D} rows of w {w.shape}")
    counts["group"] = D // group, F
  if granularity not in counts:
    raise ValueError(f"granularity {granularity!r}; allowed: {', '.join(GRANULARITIES)}")
  m, n = counts[granularity]
  d, f = (group if granularity == "group" else D // max(m, 1)), F // max(n, 1)
  tiles = w.astype(wide(w.dtype)).reshape(*w.shape[:-2], m, d, n, f)
  factor = jnp.where(_peak(tiles) > 1, 2.0**-4, 2.0**24).astype(tiles.dtype)
  return tiles * factor, factor


def _peak(tiles: Array) -> Array:
  return jnp.abs(tiles).max((-3, -1), keepdims=True, initial=0)


def _steps(x: Array, factor: Array, scale: Array) -> Array:
  """x, which is multiplied by `factor`, in steps of `scale`."""
  return x / (scale.astype(x.dtype) * factor)


def _rounded(x: Array, factor: Array, scale: Array, key: Key | None) -> Array:
  """`_steps` in whole ones."""
  steps = _steps(x, factor, scale)
  if key is None:
    return jnp.round(steps)
  return jnp.floor(steps + jax.random.uniform(key, steps.shape, steps.dtype))


def _scale(scale: Array, peak: Array, factor: Array, dtype: DTypeLike) -> Array:
  """`scale` / `factor` rounded up to `dtype`, NaN where a tile up to `peak` would be lost."""
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"scale_dtype {jnp.dtype(dtype).name}; allowed: floating point")
  tiny = float(jnp.finfo(wide(dtype)).tiny)  # what is less may count as 0
  least = max(2 * tiny, float(jnp.finfo(dtype).smallest_subnormal))
  scale, peak = jnp.maximum(scale / factor, least), peak / factor
  near = scale.astype(dtype)
  above = jnp.nextafter(near, jnp.full_like(near, jnp.inf))
  near = jnp.where(near.astype(scale.dtype) < scale, above, near)
  lost = (peak >= jnp.finfo(peak.dtype).tiny) & (2 * peak < near.astype(peak.dtype))
  return jnp.where(lost, jnp.nan, near)
