"""Panels as a figure."""

import io
import math
from collections.abc import Container, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from experiments.lab.plots.colours import styles
from experiments.lab.plots.drawing import SMALL, Looks, draw, tick_label
from experiments.lab.plots.panels import Panel
from experiments.lab.plots.places import wrapped, write_names

STYLE: Any = {
  "font.size": 10,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "grid.color": "#e6e6e6",
  "axes.axisbelow": True,
  "axes.titlelocation": "left",
  "axes.titleweight": "bold",
  "axes.titlesize": 11,
  "legend.frameon": False,
  "text.parse_math": False,
  "savefig.dpi": 160,
}
ACROSS = 3  # most panels side by side
WIDTH, HEIGHT = 5.2, 4.4  # inches of a panel
ALONE = 8.0  # inches of a figure at least
GAP = 4  # points between what lies below one another


def figure(panels: Sequence[Panel]) -> Figure:
  """The panels, and below them a legend of all series; it grows with what must be written.

  Below each panel stands what its lines mean, and a note on all that is not shown as it is.
  """
  with matplotlib.rc_context(STYLE):
    rows = max(1, math.ceil(len(panels) / ACROSS))
    columns = max(1, math.ceil(len(panels) / rows))
    height = rows * max(map(_height, panels), default=HEIGHT)
    made = Figure((max(ALONE, WIDTH * columns), height), layout="constrained")
    FigureCanvasAgg(made)
    places = made.subplots(rows, columns, squeeze=False).ravel()
    for axes in places[len(panels) :]:
      axes.remove()
    if not panels:
      made.text(0.5, 0.5, "nothing was measured", ha="center")
    every = [series for panel in panels for series in panel.series]
    looks = styles(series.name for series in every)
    joined = {series.name for series in every if series.joined}
    width = int(11 * made.get_figwidth() / columns)
    shown = [draw(axes, panel, looks, width) for axes, panel in zip(places, panels, strict=False)]
    _grow(
      made, [axes.legend_ for axes in places[: len(panels)]], columns, _legend(made, looks, joined)
    )
    for axes, named in zip(places, shown, strict=False):
      write_names(axes, [point for point, _ in named], [name for _, name in named])
  return made


def png(panels: Sequence[Panel]) -> bytes:
  """The same as a picture."""
  image = io.BytesIO()
  with matplotlib.rc_context(STYLE):
    figure(panels).savefig(image, format="png")
  return image.getvalue()


def _height(panel: Panel) -> float:
  """Inches of a panel: more where many labels stand above one another."""
  lines = sum(tick_label(name).count("\n") + 1.3 for name in (panel.y.ticks or {}).values())
  return max(HEIGHT, 1.2 + lines * SMALL * 1.4 / 72)


def _legend(made: Figure, looks: Looks, joined: Container[str]) -> Legend | None:
  """What each colour and marker means, in as many columns as the figure is wide enough for."""
  handles = [
    Line2D([], [], color=c, marker=m, ls="-" if name in joined else "", label=wrapped(name, 40))
    for name, (c, m) in looks.items()
  ]
  legend = None
  for columns in range(min(len(handles), 10), 0, -1):
    if legend is not None:
      legend.remove()
    legend = made.legend(handles=handles, loc="outside lower center", ncols=columns)
    if legend.get_window_extent().width < 0.98 * made.bbox.width:
      break
  return legend


def _grow(made: Figure, below: Sequence[Legend | None], columns: int, legend: Legend | None):
  """Puts each legend of `below` under what is written at its axes, and makes room for all."""
  rows = [below[i : i + columns] for i in range(0, len(below), columns)]
  heights = [max((x.get_window_extent().height for x in row if x), default=0.0) for row in rows]
  heights.append(legend.get_window_extent().height if legend else 0.0)
  made.set_figheight(made.get_figheight() + sum(heights) / made.dpi)
  made.canvas.draw()
  for each in filter(None, below):
    _under(each.axes, each)
  made.canvas.draw()


def _under(axes: Axes, legend: Legend) -> None:
  """Puts a legend below ticks and label of the horizontal axis."""
  written = axes.xaxis.get_tightbbox()
  depth = (axes.bbox.y0 - written.y0 if written else 0.0) + GAP * axes.figure.dpi / 72
  down = ScaledTranslation(0, -depth / axes.figure.dpi, axes.figure.dpi_scale_trans)
  legend.set_bbox_to_anchor((0, 0), axes.transAxes + down)
