"""Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split layout."""

import dataclasses

import jax.numpy as jnp

from effjax.core.known import number
from effjax.core.typing import Array, Float, Int, Scalar


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotates channel pairs (i, i + H/2) of a head by position · theta^(−2i/H) / factor.

  Attributes:
    theta: base of the wavelengths.
    factor: linear stretching of positions (position interpolation, arXiv 2306.15595).

  Raises:
    ValueError: for a number that is not above 0.
  """

  theta: Scalar = 10_000.0
  factor: Scalar = 1.0

  def __post_init__(self):
    for name in ("theta", "factor"):
      object.__setattr__(self, name, number(name, getattr(self, name), of="Rope", above=0))

  def __call__(
    self, x: Float[Array, "B T N H"], positions: Int[Array, "B T"]
  ) -> Float[Array, "B T N H"]:
    """`x` rotated by its positions, computed in float32.

    Example:
      >>> x = jnp.ones((1, 2, 1, 4))
      >>> bool((Rope()(x, jnp.zeros((1, 2), int)) == x).all())
      True
    """
    half = x.shape[-1] // 2
    if 2 * half != x.shape[-1]:
      raise ValueError(f"Rope: head width {x.shape[-1]} is odd; allowed: even widths")
    frequency = self.theta ** (-jnp.arange(half, dtype=jnp.float32) / half) / self.factor
    angle = positions.astype(jnp.float32)[..., None, None] * frequency[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
