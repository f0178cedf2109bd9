"""Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split layout."""

import dataclasses

import jax.numpy as jnp

from effjax.core.known import number
from effjax.core.typing import Array, Float, Int, Number, Scalar
from effjax.layers.rope_scaling import Scaling, plain


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotates channel pairs (i, i + R/2) of a head by position · theta^(−2i/R) / factor.

  Attributes:
    theta: base of the wavelengths.
    factor: linear stretching of positions (position interpolation, arXiv 2306.15595).
    scaling: what else changes the frequencies, see `effjax.layers.rope_scaling`; it may read the
      length of a row, that is its largest position + 1.
    fraction: the share of a head's H channels that rotates, the first R = fraction · H.

  Raises:
    ValueError: for a number that is not above 0, and a fraction above 1.
  """

  theta: Scalar = 10_000.0
  factor: Scalar = 1.0
  scaling: Scaling | None = None
  fraction: Number = 1.0

  def __post_init__(self):
    for name, most in (("theta", None), ("factor", None), ("fraction", 1)):
      value = number(name, getattr(self, name), of="Rope", above=0, most=most)
      object.__setattr__(self, name, value)

  def __call__(
    self, x: Float[Array, "B T N H"], positions: Int[Array, "B T"]
  ) -> Float[Array, "B T N H"]:
    """`x` rotated by its positions, computed in float32.

    Raises:
      ValueError: when the number of rotating channels is odd.

    Example:
      >>> x = jnp.ones((1, 2, 1, 4))
      >>> bool((Rope()(x, jnp.zeros((1, 2), int)) == x).all())
      True
    """
    rotating = int(x.shape[-1] * self.fraction)
    if rotating % 2:
      share = "" if self.fraction == 1.0 else f" of which {rotating} rotate"
      raise ValueError(f"Rope: head width {x.shape[-1]}{share} is odd; allowed: even widths")
    frequency, amplitude = self._frequencies(rotating, positions)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency[:, None, None]
    cos, sin = amplitude * jnp.cos(angle), amplitude * jnp.sin(angle)
    first, second, rest = jnp.split(x.astype(jnp.float32), (rotating // 2, rotating), axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)

  def _frequencies(self, rotating: int, positions: Array) -> tuple[Array, float]:
    """[1, R/2] or [B, R/2], and the factor of what is rotated."""
    if self.scaling is None:
      return plain(self.theta, rotating) / self.factor, 1.0
    length = positions.max(axis=1, keepdims=True) + 1
    frequency = self.scaling.frequencies(self.theta, rotating, length)
    return frequency / self.factor, self.scaling.amplitude
