"""How rotary frequencies change for texts longer than those a model was trained on.

A `Scaling` is a field of `Rope`. Those that read the length of a row let it decide for all of its
tokens: past `context` a later token changes how earlier ones are rotated, and keys that a cache
holds from before keep the rotation that they had then.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from effjax.core.typing import Array, Float, Int, Scalar


@runtime_checkable
class Scaling(Protocol):
  """Frequencies in place of theta^(−2i/R)."""

  @property
  def amplitude(self) -> float:
    """A factor of rotated queries and keys."""
    ...

  def frequencies(
    self, theta: Scalar, width: int, length: Int[Array, "B 1"]
  ) -> Float[Array, "B F"]:
    """[1, R/2], or [B, R/2] where they depend on a row's length, for R = `width` channels."""
    ...


def plain(theta: Scalar, width: int) -> Array:
  """theta^(−2i/R), i = 0 … R/2 − 1, as [1, R/2]; for theta [B, 1], [B, R/2].

  Example:
    >>> plain(100.0, 4).shape
    (1, 2)
  """
  half = width // 2
  return jnp.asarray(theta, jnp.float32) ** (-jnp.arange(half, dtype=jnp.float32)[None] / half)


@dataclasses.dataclass(frozen=True)
class Llama3:
  """Llama 3.1's: long wavelengths are divided by `factor`, short ones kept, in between blended.

  With s = (context · frequency / 2π − low) / (high − low) in [0, 1], a frequency is multiplied by
  (1 − s) / factor + s.

  Attributes:
    factor: how many times longer than `context` texts may be.
    low, high: how often a channel turns within `context`, where blending begins and ends.
    context: length of the texts before.
  """

  factor: float
  low: float
  high: float
  context: int
  amplitude: float = dataclasses.field(default=1.0, init=False)

  def frequencies(self, theta: Scalar, width: int, length: Array) -> Array:
    frequency = plain(theta, width)
    turns = self.context * frequency / (2 * math.pi)
    s = jnp.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
    return frequency * ((1 - s) / self.factor + s)


@dataclasses.dataclass(frozen=True)
class Yarn:
  """YaRN (arXiv 2309.00071): as `Llama3`, blended linearly over the channels.

  Attributes:
    factor, context: as in `Llama3`.
    amplitude: the factor of rotated queries and keys, 0.1 ln(factor) + 1 in the paper.
    fast, slow: how often the channels turn within `context` between which is blended.
    whole: whether blending begins and ends at whole channels.
  """

  factor: float
  context: int
  amplitude: float = 1.0
  fast: float = 32.0
  slow: float = 1.0
  whole: bool = True

  def frequencies(self, theta: Scalar, width: int, length: Array) -> Array:
    # The channel that turns r times within the context.
    channel = lambda r: width * math.log(self.context / (2 * math.pi * r)) / (2 * math.log(theta))
    begin, end = channel(self.fast), channel(self.slow)
    if self.whole:
      begin, end = math.floor(begin), math.ceil(end)
    begin, end = max(begin, 0), min(end, width - 1)
    end = end + 0.001 if begin == end else end
    stretched = np.clip((np.arange(width // 2) - begin) / (end - begin), 0.0, 1.0)
    blend = jnp.asarray(stretched / self.factor + 1 - stretched, jnp.float32)
    return plain(theta, width) * blend[None]


@dataclasses.dataclass(frozen=True)
class DynamicNTK:
  """The base grows with the length L of a row: theta · (factor · L/context − factor + 1)^(R/(R−2)).

  Rows up to `context` are as without it.
  """

  factor: float
  context: int
  amplitude: float = dataclasses.field(default=1.0, init=False)

  def frequencies(self, theta: Scalar, width: int, length: Array) -> Array:
    ratio = jnp.maximum(length, self.context).astype(jnp.float32) / self.context
    growth = self.factor * ratio - (self.factor - 1)
    return plain(theta * growth ** (width / (width - 2)), width)


@dataclasses.dataclass(frozen=True)
class Divided:
  """LongRoPE (arXiv 2402.13753): a divisor for each channel pair, others for long rows.

  Attributes:
    short, long: R/2 divisors of rows up to `context`, and of longer ones.
    context: the length after which they change.
    amplitude: the factor of rotated queries and keys.
  """

  short: tuple[float, ...]
  long: tuple[float, ...]
  context: int
  amplitude: float = 1.0

  def frequencies(self, theta: Scalar, width: int, length: Array) -> Array:
    for name in ("short", "long"):
      if len(getattr(self, name)) != width // 2:
        found = len(getattr(self, name))
        raise ValueError(f"Divided: {found} numbers in {name}; allowed: {width // 2}")
    short, long = (jnp.asarray(x, jnp.float32)[None] for x in (self.short, self.long))
    return plain(theta, width) / jnp.where(length > self.context, long, short)
