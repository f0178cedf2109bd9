"""What a picture alone does not tell: what bars are, and what of the values it does not show."""

import re
from collections.abc import Iterator

import numpy as np

from experiments.lab.plots.panels import LINEAR, Panel, Series
from experiments.lab.plots.sides import Sides

MOST = 4  # names in a note
LOST = "not finite"
LOW = "not above 0, for which a logarithmic axis has no place"
BEYOND = "beyond the axis"
LONG = "bars longer than the axis"


def notes(panel: Panel, both: Sides) -> list[str]:
  """A sentence for each thing of a panel that is not drawn as it is."""
  told: dict[str, list[str]] = {}
  for series in panel.series:
    fates: dict[str, list[tuple[int, float]]] = {}
    for index, fate, value in _fates(series, both):
      fates.setdefault(fate, []).append((index, value))
    for fate, found in fates.items():
      names = [f"{_name(panel, series, i)} ({plain(value)})" for i, value in found]
      every = series.joined and len(found) == len(series.x)
      told.setdefault(fate, []).extend([f"all of {series.name}"] if every else names)
  hidden = [line.words for line in panel.lines if not both.draws(line)]
  if hidden:
    told["no line, for want of a place"] = list(dict.fromkeys(hidden))
  return _bars(panel) + [f"{fate}: {_some(names)}" for fate, names in told.items()]


def _fates(series: Series, both: Sides) -> Iterator[tuple[int, str, float]]:
  """Each point that is not drawn as it is: its index, what becomes of it, and which value it is."""
  for i, (x, y, spread) in enumerate(series.points().T):
    value = y if both.x.shows(x) and both.x.low <= x <= both.x.high else x
    if series.x[i] is None or series.y[i] is None:
      continue
    if not np.isfinite([x, y]).all():
      yield i, LOST, value
    elif not (both.x.shows(x) and both.y.shows(y)):
      yield i, LOW, value
    elif both.arrow(x, y):
      yield i, BEYOND, value
    elif both.cuts(series.along, x, y, spread):
      yield i, LONG, spread


def _name(panel: Panel, series: Series, index: int) -> str:
  """What a point is called: by its own name, by what stands at the axis, or by its place."""
  if series.names:
    return series.names[index]
  x, y, _ = series.points()[:, index].tolist()
  for axis, value in ((panel.y, y), (panel.x, x)):
    if axis.scale == LINEAR and axis.ticks and value in axis.ticks:
      return f"{axis.ticks[value]}, {series.name}"
  return f"{series.name} at {plain(x)}"


def plain(value: float) -> str:
  """A number in few letters.

  Example:
    >>> [plain(x) for x in (0.5, 1234.5, 1e6, 2.5e-7)]
    ['0.5', '1,234', '1e6', '2.5e-7']
  """
  text = f"{value:,.4g}"
  return re.sub(r"e([+-])0*", lambda found: "e" + found[1].strip("+"), text)


def _some(names: list[str]) -> str:
  more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
  return ", ".join(names[:MOST]) + more


def _bars(panel: Panel) -> list[str]:
  """What bars mean, where the panel is to have some."""
  spreads = np.array([spread for series in panel.series for spread in series.points()[2]])
  if not panel.bars or not spreads.size:
    return []
  there = np.isfinite(spreads)
  if not there.any():
    return ["no bars: one seed"]
  return [f"bars: {panel.bars}" + ("" if there.all() else "; none on points of one seed")]
