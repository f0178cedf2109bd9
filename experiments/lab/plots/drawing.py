"""One panel on its axes: series, lines, and what is told of them beneath."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis as Side
from matplotlib.axis import XAxis
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from experiments.lab.plots.colours import INK
from experiments.lab.plots.notes import notes, plain
from experiments.lab.plots.panels import Axis, Line, Panel, Series
from experiments.lab.plots.places import wrapped
from experiments.lab.plots.scales import Scale
from experiments.lab.plots.sides import Sides, of_panel

DASHES = ((5, 2), (1, 1.5), (7, 2, 1, 2), (3, 1, 1, 1, 1, 1), (10, 3))
MOST = 24  # labels of an axis
SMALL = 8  # points of long labels and of notes
LETTERS = 44  # of the labels of a horizontal axis that have room side by side
MARKED = 12  # of the points of a long line, about how many have a marker
Looks = Mapping[str, tuple[str, str]]
Named = list[tuple[tuple[float, float], str]]


def draw(axes: Axes, panel: Panel, looks: Looks, width: int) -> Named:
  """Draws a panel, its notes `width` letters wide; points where a name is to be written."""
  both = of_panel(panel)
  axes.set_title(wrapped(panel.title, int(0.85 * width)))
  axes.set_xscale("log" if both.x.log else "linear")
  axes.set_yscale("log" if both.y.log else "linear")
  axes.set(xlim=(both.x.low, both.x.high), ylim=(both.y.low, both.y.high))
  axes.set(xlabel=wrapped(panel.x.words, width), ylabel=wrapped(panel.y.words, 50))
  _label(axes.xaxis, panel.x, both.x)
  _label(axes.yaxis, panel.y, both.y)
  for series in panel.series:
    _series(axes, series, both, *looks[series.name])
  if not any(len(both.shown(series)) for series in panel.series):
    axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center")
  told = _lines(axes, panel.lines, both, looks)
  told += [Line2D([], [], linestyle="", label=note) for note in notes(panel, both)]
  for handle in told:
    handle.set_label(wrapped(str(handle.get_label()), width, lines=4))
  if told:
    axes.legend(handles=told, loc="upper left", fontsize=SMALL, borderaxespad=0, borderpad=0)
  return [
    (both.within(*series.points()[:2, i]), series.names[i])
    for series in panel.series
    for i in (both.shown(series) if series.names else ())
  ]


def tick_label(name: str) -> str:
  """How a name stands at an axis."""
  return wrapped(name, 34)


def _label(side: Side, axis: Axis, scale: Scale) -> None:
  """Ticks and their labels."""
  if scale.log:
    ratio = scale.high / scale.low
    steps = LogLocator(subs=(1, 2, 5) if ratio < 300 else (1,), numticks=8)
    side.set_major_locator(steps if ratio > 10 else MaxNLocator(6))
    side.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    side.set_minor_formatter(NullFormatter())
  if axis.ticks is None:
    return
  seen = [(v, name) for v, name in axis.ticks.items() if scale.low <= v <= scale.high]
  kept = seen[:: max(1, -(-len(seen) // MOST))]
  names = [tick_label(name) for _, name in kept]
  look: dict[str, Any] = {"fontsize": SMALL} if max(map(len, names), default=0) > 12 else {}
  if isinstance(side, XAxis) and sum(map(len, names)) > LETTERS:
    look |= {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
  side.set_ticks([v for v, _ in kept], names, **look)
  side.set_minor_locator(NullLocator())


def _series(axes: Axes, series: Series, both: Sides, colour: str, marker: str) -> None:
  """Points, bars and line; an arrow at the edge stands for a point that lies beyond it."""
  points = np.full((3, len(series.x)), np.nan)
  shown = both.shown(series)
  points[:, shown] = series.points()[:, shown]
  x, y, spread = points
  every = max(1, len(x) // MARKED)
  look: Any = {"color": colour, "marker": marker, "linestyle": "-" if series.joined else ""}
  axes.plot(x, y, **look, markevery=every, markersize=5)
  barred = np.isfinite(spread)
  if barred.any():
    error = {f"{series.along}err": spread[barred]}
    axes.errorbar(x[barred], y[barred], **error, fmt="none", ecolor=colour, capsize=3)
  for i in shown:
    if arrow := both.arrow(x[i], y[i]):
      axes.plot(*both.within(x[i], y[i]), arrow, color=colour, ms=8, clip_on=False, zorder=5)


def _lines(axes: Axes, lines: Sequence[Line], both: Sides, looks: Looks) -> list[Line2D]:
  """Draws what verdicts are about; a handle for each meaning."""
  meanings: dict[str, Line2D] = {}
  dashes = {words: (0, DASHES[i % len(DASHES)]) for i, words in enumerate(_words(lines))}
  for line in lines:
    colour = looks[line.of][0] if line.of else INK
    look: Any = {"color": colour, "linewidth": 1.2, "zorder": 1.5}
    look["linestyle"] = dashes[line.words]
    x: Any = line.x
    y: Any = line.y
    if not both.draws(line):
      continue
    if y is None:
      axes.axvline(x, **look)
    elif x is None:
      axes.axhline(y, **look)
    else:
      axes.plot(np.array(x, float), np.array(y, float), **look)
    again = meanings.get(line.words)
    look["color"] = INK if again and again.get_color() != colour else colour
    meanings[line.words] = Line2D([], [], label=line.words, **look)
  return list(meanings.values())


def _words(lines: Sequence[Line]) -> list[str]:
  return list(dict.fromkeys(line.words for line in lines))
