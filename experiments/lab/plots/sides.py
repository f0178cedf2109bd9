"""The scales of both sides of a panel, and where they place points, bars and lines."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from experiments.lab.plots.panels import LINEAR, Line, Panel, Series
from experiments.lab.plots.scales import MARGIN, Scale, fitted

NAMED = {"x": 0.25, "y": 0.12}  # free parts of a range where names are written beside points


@dataclasses.dataclass(frozen=True)
class Sides:
  """The scales of both axes."""

  x: Scale
  y: Scale

  def shown(self, series: Series) -> np.ndarray:
    """Which points have a place, on the axes or beyond them."""
    x, y, _ = series.points()
    return np.flatnonzero(self.x.shows(x) & self.y.shows(y))

  def draws(self, line: Line) -> bool:
    """Whether a line has a place."""
    both = ((self.x, line.x), (self.y, line.y))
    return all(at is None or scale.shows(np.array(at, float)).any() for scale, at in both)

  def within(self, x: float, y: float) -> tuple[float, float]:
    """The place on the axes that is nearest to a point."""
    at = np.clip((x, y), (self.x.low, self.y.low), (self.x.high, self.y.high))
    return float(at[0]), float(at[1])

  def arrow(self, x: float, y: float) -> str:
    """The marker that points to where a point lies beyond the axes; "" when it does not."""
    for value, scale, marks in ((x, self.x, "<>"), (y, self.y, "v^")):
      if not scale.low <= value <= scale.high:
        return marks[int(value > scale.high)]
    return ""

  def cuts(self, along: str, x: float, y: float, spread: float) -> bool:
    """Whether the bar of a point goes on beyond the axis; that to 0 on a logarithmic one does."""
    value, scale = (x, self.x) if along == "x" else (y, self.y)
    return bool(value + spread > scale.high or value - spread < scale.low)


def of_panel(panel: Panel) -> Sides:
  """The scales for all that a panel shows."""
  return Sides(_of_side(panel, "x"), _of_side(panel, "y"))


def _of_side(panel: Panel, side: str) -> Scale:
  axis = getattr(panel, side)
  places = [getattr(line, side) for line in panel.lines]
  always = [float(x) for x in places if x is not None and not np.ndim(x)]
  curves = [x for place in places if place is not None and np.ndim(place) for x in place]
  values = [x for series in panel.series for x in getattr(series, side)]
  named = any(series.names for series in panel.series)
  margin = NAMED[side] if named else MARGIN
  if axis.scale == LINEAR and axis.ticks:
    always, margin = [*always, min(axis.ticks) - 0.5, max(axis.ticks) + 0.5], 0.0
  measured = [np.nan if x is None else x for x in (*values, *curves)]
  return fitted(measured, always, _ends(panel, side), axis.scale, margin)


def _ends(panel: Panel, side: str) -> Iterator[float]:
  """Where the bars end that are parallel to a side."""
  for series in panel.series:
    if series.along == side:
      x, y, spread = series.points()
      middle = x if side == "x" else y
      yield from (*(middle - spread), *(middle + spread))
