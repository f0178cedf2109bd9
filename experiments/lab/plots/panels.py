"""What a plot shows: panels of series, and the lines that verdicts are about."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

LOG, LINEAR = "log", "linear"
Values = Sequence[float | None]


@dataclasses.dataclass(frozen=True)
class Axis:
  """A quantity.

  Attributes:
    words: what it is, and its unit.
    scale: "log", "linear", or None where the values decide.
    ticks: what is written at which values; None for round numbers.
  """

  words: str
  scale: str | None = None
  ticks: Mapping[float, str] | None = None

  def __post_init__(self):
    if self.scale not in (LOG, LINEAR, None):
      raise ValueError(f"scale={self.scale!r}; allowed: {LOG!r}, {LINEAR!r}, None")


@dataclasses.dataclass(frozen=True)
class Series:
  """Points of one kind. A coordinate that is None was not measured.

  Attributes:
    name: for the legend; it has one colour and marker in all panels of a figure.
    x, y: of the points.
    spread: half of the bar on each point; None where there is none.
    along: the axis that bars are parallel to, "x" or "y".
    joined: whether a line goes through the points.
    names: of the points, written beside them.
  """

  name: str
  x: Values
  y: Values
  spread: Values = ()
  along: str = "y"
  joined: bool = True
  names: Sequence[str] = ()

  def __post_init__(self):
    for field in ("y", "spread", "names"):
      given = len(getattr(self, field))
      if given != len(self.x) and (given or field == "y"):
        raise ValueError(f"{field} has {given} values; allowed: as many as x, {len(self.x)}")

  def points(self) -> np.ndarray:
    """x, y and the half of the bar, [3, points]; NaN for what is None."""
    spread = self.spread or [None] * len(self.x)
    return np.array([self.x, self.y, spread], float)


@dataclasses.dataclass(frozen=True)
class Line:
  """What a verdict is about: upright with x alone, level with y alone, a curve with sequences.

  Attributes:
    words: for the legend.
    x, y: its place, or places.
    of: the name of a series, whose colour it has.
  """

  words: str
  x: float | Values | None = None
  y: float | Values | None = None
  of: str = ""


@dataclasses.dataclass(frozen=True)
class Panel:
  """One pair of axes.

  Attributes:
    title: above it.
    x, y: its quantities.
    series: what was measured.
    lines: what verdicts are about.
    bars: what bars mean, where a series has a spread.
  """

  title: str
  x: Axis
  y: Axis
  series: Sequence[Series]
  lines: Sequence[Line] = ()
  bars: str = ""
