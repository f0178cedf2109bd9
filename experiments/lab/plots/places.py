"""Names beside points, where they cover least."""

import itertools
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.text import Text

REACH = 6  # pixels that a point takes on each side
SIDES = (8, -8, 40, -40, 90, -90)  # in points, to the right and left
SHIFTS = sorted(range(-120, 121, 6), key=abs)  # in points, up and down
NEAR = 12  # in points; a name farther off has a line to its point


def wrapped(text: str, width: int, lines: int = 3) -> str:
  """`text` in lines of up to `width` letters; "…" stands for what there are no lines for.

  Example:
    >>> print(wrapped("a very long name of a technique", 12, lines=2))
    a very long
    name of a …
  """
  return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


def write_names(axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
  """Writes names beside points, each at the place where it covers least and lies nearest.

  Call it last: places are found in pixels of the axes as they then are.
  """
  pixels = axes.transData.transform(np.reshape(points, (-1, 2)))
  taken = [np.array([x - REACH, y - REACH, x + REACH, y + REACH]) for x, y in pixels]
  lines = (line.get_window_extent().padded(1) for line in axes.lines if _straight(line))
  taken += [np.array(box.extents) for box in lines]
  offsets = np.array(list(itertools.product(SIDES, SHIFTS)), float)
  scale = axes.figure.dpi / 72
  inside = np.array(axes.get_window_extent().extents)
  for i in sorted(range(len(points)), key=lambda i: tuple(pixels[i])[::-1]):
    text = axes.annotate(
      wrapped(names[i], 28),
      points[i],
      (0, 0),
      textcoords="offset points",
      fontsize=8,
      va="center",
      annotation_clip=False,
      arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkB": 4},
    )
    text.set_in_layout(False)
    sizes = np.array(Text.get_window_extent(text).size)  # without the line to the point
    centres = pixels[i] + scale * offsets + np.sign(offsets) * [sizes[0] / 2, 0]
    boxes = np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1)
    costs = _covered(boxes, np.stack(taken)) + 10 * _outside(boxes, inside)
    best = int((costs + np.hypot(*offsets.T)).argmin())
    text.set_position(tuple(offsets[best]))
    text.set_horizontalalignment("left" if offsets[best, 0] > 0 else "right")
    if text.arrow_patch is not None:
      text.arrow_patch.set_visible(bool(np.hypot(*offsets[best]) > NEAR))
    taken.append(boxes[best])


def _straight(line: Line2D) -> bool:
  """Whether a line is level or upright and crosses the axes."""
  places = (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
  return len(places[0]) == 2 and any(list(at) == [0, 1] for at in places)


def _covered(boxes: np.ndarray, taken: np.ndarray) -> np.ndarray:
  """Pixels of each box that others take, [boxes]."""
  low = np.maximum(boxes[:, None, :2], taken[:, :2])
  high = np.minimum(boxes[:, None, 2:], taken[:, 2:])
  return np.clip(high - low, 0, None).prod(axis=-1).sum(axis=1)


def _outside(boxes: np.ndarray, inside: np.ndarray) -> np.ndarray:
  """Pixels of each box that lie outside of the axes, [boxes]."""
  area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
  return area - _covered(boxes, inside[None])
