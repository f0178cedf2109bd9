"""Colours and markers that stay apart, however many there are."""

import colorsys
import functools
from collections.abc import Iterable

import numpy as np
from matplotlib import colors

INK = "#222222"
FIRST = (
  "#2a5d9f",
  "#d1662f",
  "#3a8f5c",
  "#8a4f9e",
  "#b8912b",
  "#5c6b73",
  "#c2607f",
  "#55b3c9",
)  # fmt: skip
MARKERS = "osD^vPX*<>hd"
SHADES = ((0.25, 0.6), (0.4, 0.5), (0.55, 0.6), (0.7, 0.6))  # lightness and saturation

# Linear RGB → cones, and their cube roots → lightness and two opponents (B. Ottosson, Oklab).
CONES = (
  (0.4122214708, 0.5363325363, 0.0514459929),
  (0.2119034982, 0.6806995451, 0.1073969566),
  (0.0883024619, 0.2817188376, 0.6299787005),
)
OPPONENTS = (
  (0.2104542553, 0.7936177850, -0.0040720468),
  (1.9779984951, -2.4285922050, 0.4505937099),
  (0.0259040371, 0.7827717662, -0.8086757660),
)


def styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
  """A colour and a marker for each name, in order of appearance.

  Example:
    >>> styles(["dense", "moe", "dense"])
    {'dense': ('#2a5d9f', 'o'), 'moe': ('#d1662f', 's')}
  """
  known = list(dict.fromkeys(names))
  colours = palette(len(known))
  return {n: (colours[i], MARKERS[i % len(MARKERS)]) for i, n in enumerate(known)}


@functools.cache
def palette(count: int) -> tuple[str, ...]:
  """`FIRST`, then each time the colour farthest from those before, from white and from `INK`."""
  hues = [colorsys.hls_to_rgb(i / 24, *shade) for i in range(24) for shade in SHADES]
  candidates, found = [colors.to_hex(hue) for hue in hues], list(FIRST)
  taken, places = perceived([*found, "#ffffff", INK]), perceived(candidates)
  while len(found) < count:
    apart = np.linalg.norm(places[:, None] - taken, axis=-1).min(axis=1)
    best = int(apart.argmax())
    found.append(candidates[best])
    taken = np.concatenate([taken, places[best : best + 1]])
  return tuple(found[:count])


def perceived(colours: Iterable[str]) -> np.ndarray:
  """Oklab coordinates, [colours, 3], in which distances are differences as they are seen."""
  rgb = np.array([colors.to_rgb(colour) for colour in colours])
  linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
  return np.cbrt(linear @ np.array(CONES).T) @ np.array(OPPONENTS).T
