"""Palettisation: each number, or each colour, as the index of one of a few (k-means codebooks).

Han et al., "Deep Compression", arXiv 1510.00149, section 3; k-means is Lloyd's, of one codebook for
each matrix. With points of three numbers it is what reduces a picture to 16 colours.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effjax.core.known import number
from effjax.core.register import register
from effjax.core.typing import Array, Float, Int, Num, PyTree, Size
from effjax.kernels.quantized_matmul import Indices
from effjax.quant.basics import check_scales
from effjax.quant.nearest import nearest
from effjax.quant.packed import Packed, lying

CHUNK = 1 << 16  # points whose distances to all colours are there at once
BLOCK = 64  # inputs whose numbers are made side by side, where they divide


@functools.partial(jax.jit, static_argnames=("colours", "steps"))
def kmeans(
  points: Num[Array | np.ndarray, "N C"], colours: Size, *, steps: Size = 30
) -> tuple[Float[Array, "K C"], Int[Array, "N"]]:
  """K centres and the nearest of each point, after `steps` of Lloyd's algorithm.

  Σ |point − centre|² falls with each step: points go to their nearest centre, and a centre to the
  mean of its points; one without points stays. The first centres of numbers are numbers in even
  steps among all that differ; those of other points the means of groups, of which again and again
  the widest is cut at its mean. Where there are no more than K different points, each is a centre.
  Nothing is drawn at random.

  Args:
    points: N points of C numbers.
    colours: K.
    steps: how often the centres move.

  Raises:
    ValueError: for less than one colour, or no points.

  Example:
    >>> centres, index = kmeans(jnp.array([[0.0], [8.0], [1.0], [9.0]]), 2)
    >>> centres.tolist(), index.tolist()
    ([[0.5], [8.5]], [0, 1, 0, 1])
  """
  number("colours", colours, integer=True, least=1)
  number("steps", steps, integer=True, least=0)
  if points.ndim != 2 or not points.size:
    raise ValueError(f"points has shape {points.shape}; allowed: [N, C], some of them")
  points = jnp.asarray(points).astype(jnp.float32)

  def step(_, centres):
    index = _index(points, centres)
    count = jnp.zeros(colours).at[index].add(1)[:, None]
    # From the centre on, so that of many points the sum is as exact as of few.
    apart = jnp.zeros_like(centres).at[index].add(points - centres[index])
    return centres + apart / jnp.maximum(count, 1)

  centres = lax.fori_loop(0, steps, step, _start(points, colours))
  centres = centres[jnp.lexsort(centres.T[::-1])]
  return centres, _index(points, centres)


def _start(points: Float[Array, "N C"], colours: int) -> Float[Array, "K C"]:
  return (_spaced if points.shape[1] == 1 else _halved)(points, colours)


def _spaced(points: Float[Array, "N 1"], colours: int) -> Float[Array, "K 1"]:
  """Numbers that differ, in even steps among all that do."""
  along = jnp.sort(points, axis=0)
  rank = jnp.cumsum(jnp.concatenate([jnp.zeros(1, bool), along[1:, 0] != along[:-1, 0]]))
  wanted = jnp.linspace(0, 1, colours) * rank[-1] if colours > 1 else rank[-1:] / 2
  return along[jnp.searchsorted(rank, jnp.round(wanted).astype(rank.dtype))]


def _halved(points: Float[Array, "N C"], colours: int) -> Float[Array, "K C"]:
  """The means of groups: again and again the widest is cut at its mean, across its main axis."""

  def measured(mask, near):
    """Mean, width and main axis of a group of points, the mean `near` if there are none."""
    share = mask / jnp.maximum(mask.sum(), 1)
    mean = near + share @ (points - near[None])
    mean += share @ (points - mean[None])
    apart = jnp.where(mask[:, None], points - mean[None], 0)
    width, axes = jnp.linalg.eigh(apart.T @ apart)
    return mean, width[-1], axes[:, -1]

  def cut(new, state):
    group, means, widths, axes = state
    old = widths.argmax()
    beyond = (points - means[old][None]) @ axes[old] > 0
    group = jnp.where((group == old) & beyond, new, group)
    for each in (old, new):
      found = measured(group == each, means[old])
      means, widths, axes = (
        x.at[each].set(y) for x, y in zip((means, widths, axes), found, strict=True)
      )
    return group, means, widths, axes

  group = jnp.zeros(len(points), jnp.int32)
  found = measured(group == 0, points[0])
  first = (jnp.zeros((colours, *x.shape)).at[0].set(x) for x in found)
  return lax.fori_loop(1, colours, cut, (group, *first))[1]


def _index(points: Float[Array, "N C"], centres: Float[Array, "K C"]) -> Int[Array, "N"]:
  if points.shape[1] == 1:
    order = jnp.argsort(centres[:, 0])
    return order[nearest(points[:, 0], centres[order, 0])].astype(jnp.int32)

  def closest(point):
    return jnp.square(point[None] - centres).sum(-1).argmin().astype(jnp.int32)

  return lax.map(closest, points, batch_size=CHUNK)


@register(static=("bits",), kind="quantised")
class Palette(Packed):
  """M[o, i] = colours[code[o, i]], one of 2^bits numbers that k-means finds for the matrix.

  Invariants:
    codes: uint8 [..., O, I · bits / 8], the bits of one code after those of another.
    colours: float32 [..., 1, 2^bits], increasing.
    bits: 1 … 8.
  """

  colours: PyTree
  bits: int = dataclasses.field(default=4, kw_only=True)

  @property
  def format(self) -> Indices:
    inputs = self.codes.shape[-1] // self.bits * 8
    return Indices(self.bits, math.gcd(inputs, BLOCK))

  @classmethod
  def quantize(
    cls,
    w: Num[Array | np.ndarray, "... D F"],
    *,
    bits: Size = 4,
    steps: Size = 30,
    table: bool = False,
  ) -> "Palette":
    """The one of `w` that `kmeans` finds.

    Args:
      w: matrices [..., D, F], inputs by outputs; each has colours of its own.
      bits: 1 … 8, for 2^bits colours.
      steps: of k-means.
      table: whether w is a table of rows [..., V, D].

    Raises:
      ValueError: for other bits, and when 8 does not divide the inputs; when `w` is not a
        floating-point matrix, or holds NaN or infinity, where values are known.

    Example:
      >>> w = Palette.quantize(jnp.array([[0.0, 1.0]] * 4 + [[2.0, 3.0]] * 4), bits=2)
      >>> w.colours.tolist(), w.codes.tolist(), w.materialize()[0].tolist()
      ([[0.0, 1.0, 2.0, 3.0]], [[0, 170], [85, 255]], [0.0, 1.0])
    """
    number("bits", bits, integer=True, least=1, most=8)
    codes, colours = _encode(lying(w, table, "block", 8), bits=bits, steps=steps)
    check_scales(colours)
    return cls(codes, colours, bits=bits, dtype=jax.typeof(w).dtype, table=table)


@functools.partial(jax.jit, static_argnames=("bits", "steps"))
def _encode(m: Float[Array, "... O I"], *, bits: int, steps: int):
  *batch, outputs, inputs = m.shape
  flat = m.reshape(-1, outputs * inputs, 1)
  centres, index = lax.map(lambda points: kmeans(points, 2**bits, steps=steps), flat)
  codes = Indices(bits).pack(index.reshape(m.shape))
  return codes, centres.reshape(*batch, 1, 2**bits)
