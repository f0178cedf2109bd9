"""Colours, scales, notes and places: one more kind, one outlier, one seed, nothing at all."""

import itertools
import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from experiments.lab import plots
from experiments.lab.plots import LINEAR, LOG, Axis, Line, Panel, Series
from experiments.lab.plots.colours import perceived, styles
from experiments.lab.plots.scales import fitted
from experiments.lab.verdicts import Verdict, alike, less

LONG = "an experiment of one's own whose name, with $ and _ and ^, is far longer than any of ours"


def panel(*series, x=None, y=None, **others):
  return Panel("Title", x or Axis("size (MB)"), y or Axis("loss (nats)"), series, **others)


def told(axes):
  """What stands beneath a panel, in one line."""
  return " ".join(" ".join(text.get_text() for text in axes.get_legend().get_texts()).split())


def drawn(*panels):
  made = plots.figure(panels)
  check(made, panels)
  return made.axes


def check(made, panels):
  """All is inside of the figure, and every series can be told from the others."""
  box, width, height = made.get_tightbbox(), *made.get_size_inches()
  assert box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01
  names = dict.fromkeys(series.name for panel in panels for series in panel.series)
  (legend,) = made.legends or [None]
  assert len(names) == (len(legend.get_texts()) if legend else 0)
  looks = [(to_hex(x.get_color()), x.get_marker()) for x in legend.get_lines()] if legend else []
  assert len({colour for colour, _ in looks}) == len(names)
  for axes, panel in zip(made.axes, panels, strict=True):
    assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title(loc="left")
    shape = axes.get_window_extent()
    assert min(shape.width, shape.height) > 1.5 * made.dpi
    below = axes.get_legend()
    assert below is None or not below.get_window_extent().overlaps(shape)
    assert below is None or not below.get_window_extent().overlaps(axes.xaxis.get_tightbbox())
    assert legend is None or not legend.get_window_extent().overlaps(axes.get_tightbbox())
    colours = {to_hex(line.get_color()) for line in axes.lines}
    shown = [s for s in panel.series if np.isfinite(s.points()[:2]).all(0).any()]
    assert {styles(names)[series.name][0] for series in shown} <= colours


def test_colours_stay_apart_from_one_another_from_white_and_from_lines():
  looks = styles(map(str, range(40)))
  colours = [colour for colour, _ in looks.values()]
  places = perceived([*colours, "#ffffff", "#222222"])
  apart = min(np.linalg.norm(a - b) for a, b in itertools.combinations(places, 2))
  assert apart > 0.04  # twice what is just seen
  assert list(styles(["a", "b"]).values()) == list(looks.values())[:2]  # more do not change these
  assert len({marker for _, marker in list(looks.values())[:12]}) == 12


@pytest.mark.parametrize(
  ("values", "log", "inside"),
  [
    ([1.0, 2.0, 50.0], False, 3),
    ([1.0, 2.0, 400.0], True, 3),  # a ratio of a hundred: logarithmic
    ([9.2, 17.3, 22.6, 9.2, 9200.0], True, 5),
    ([3.1, 3.2, 3.3, 3300.0], False, 3),  # an outlier that would leave a single place to the rest
    ([3.1, 3.2, 3.3, 3.4, 3.2, 3.3, 3.1, 3.2, 3300.0, 9e5], False, 8),
    ([3100.0, 3200.0, 3300.0, 3.1], False, 3),
    ([-0.1, 0.02, 0.05, 190.0], False, 3),
    ([-0.1, 0.02, 0.05, -190.0], False, 3),
    ([0.0, 0.0, 0.0, 0.5], False, 4),
    ([2.0**i for i in range(12)], True, 12),
    ([math.nan, math.inf, 1.0, 2.0], False, 2),
    ([5.0], False, 1),
    ([0.0], False, 1),
    ([], False, 0),
  ],
)
def test_the_scale_follows_the_values(values, log, inside):
  scale = fitted(values)
  assert scale.log == log
  assert scale.low < scale.high
  assert sum(scale.low < value < scale.high for value in values) == inside


def test_a_given_scale_is_kept_and_zero_has_no_place_on_a_logarithmic_one():
  assert fitted([1.0, 1000.0, 3.0, 2.0], scale=LINEAR).high > 1000
  scale = fitted([0.0, -1.0, 1.0, 2.0], scale=LOG)
  assert scale.log and 0 < scale.low < 1
  assert scale.shows(np.array([0.0, -1.0, math.nan, 1.0])).tolist() == [False, False, False, True]
  assert fitted([0.0, -1.0], scale=LOG).low > 0


def test_what_a_verdict_is_about_is_within_the_limits_and_decides_the_scale():
  assert fitted([1.0, 1.1], [2.0]).high > 2
  assert not fitted([1.0, 500.0], [0.0]).log
  assert fitted([3.1, 3.2, 3300.0], [3.0]).high < 4


def test_bars_widen_the_limits_unless_one_is_an_outlier():
  assert fitted([1.0, 2.0], bars=[0.5, 2.5]).high > 2.5
  assert fitted([1.0, 2.0], bars=[0.5, 2500.0]).high < 3


def test_a_wrong_scale_or_length_is_named():
  with pytest.raises(ValueError, match="scale='logarithmic'; allowed: 'log', 'linear', None"):
    Axis("x", "logarithmic")
  with pytest.raises(ValueError, match="spread has 1 values; allowed: as many as x, 2"):
    Series("a", [1, 2], [1, 2], [0.1])
  with pytest.raises(ValueError, match="y has 0 values"):
    Series("a", [1], [])


def test_thirty_kinds_of_long_names_are_told_apart():
  series = [Series(f"{i}: {LONG}", [1, 2], [i, i + 1.0]) for i in range(30)]
  lines = [Line(f"{i}: {LONG}", y=float(i)) for i in range(6)]
  (axes,) = drawn(panel(*series, x=Axis(LONG), y=Axis(LONG), lines=lines))
  assert len({line.get_linestyle() for line in axes.get_legend().get_lines()}) <= 6
  assert "$ and" in axes.get_xlabel()


def test_an_outlier_is_an_arrow_at_the_edge_and_told():
  y, spread = [3.1, 3.2, 3.3, 3300.0], [0.01, 0.02, 0.02, 900.0]
  (axes,) = drawn(panel(Series("moe", [1, 2, 3, 4], y, spread), bars="deviation over seeds"))
  assert axes.get_yscale() == "linear"
  assert axes.get_ylim()[1] < 4
  (arrow,) = [line for line in axes.lines if line.get_marker() == "^"]
  assert arrow.get_xydata().tolist() == [[4.0, axes.get_ylim()[1]]]
  assert told(axes) == "bars: deviation over seeds beyond the axis: moe at 4 (3,300)"


@pytest.mark.parametrize(("x", "marker"), [([1, 1.1, 1.2, 9e3], ">"), ([900, 910, 920, 0.1], "<")])
def test_an_outlier_to_the_side(x, marker):
  names = ["a", "b", "c", "far"]
  (axes,) = drawn(panel(Series("kind", x, [1.0, 2.0, 3.0, 2.0], joined=False, names=names)))
  assert [line.get_marker() for line in axes.lines if line.get_marker() in "<>v^"] == [marker]
  assert "beyond the axis: far (" in told(axes)
  assert {text.get_text() for text in axes.texts} == set(names)


def test_one_seed_has_no_bar_and_says_so():
  one = Series("dense", [1, 2], [3.0, 3.1], [None, None])
  some = Series("moe", [1, 2], [2.9, 3.0], [0.1, None])
  first, second = drawn(panel(one, bars="deviation"), panel(some, one, bars="deviation"))
  assert told(first) == "no bars: one seed" and not first.containers
  assert told(second) == "bars: deviation; none on points of one seed"
  assert len(second.containers) == 1


def test_what_is_not_finite_or_not_above_zero_is_told():
  lost = Series("a", [1, 2, 3], [math.nan, -math.inf, 1.0])
  low = Series("b", [1, 2, 3], [0.0, 1.0, 2.0])
  gone = Series("c", [1, 2, 3], [-1e-16, 0.0, -1.0])
  missing = Series("d", [1, 2, 3], [None, 1.0, None])
  log = Axis("gap", LOG)
  (axes,) = drawn(panel(lost, low, gone, missing, y=log, lines=[Line("bound", y=math.nan)]))
  assert axes.get_yscale() == "log"
  assert told(axes) == (
    "not finite: a at 1 (nan), a at 2 (-inf) not above 0, for which a logarithmic axis has no "
    "place: b at 1 (0), all of c no line, for want of a place: bound"
  )


def test_a_note_names_a_few():
  y = [math.nan] * 9 + [1.0]
  (axes,) = drawn(panel(Series("a", range(10), y)))
  assert told(axes).endswith("a at 3 (nan) and 5 more")


def test_a_bar_that_leaves_the_axis_is_told():
  (axes,) = drawn(panel(Series("a", [1, 2], [1.0, 2.0], [0.1, 4000.0]), bars="deviation"))
  assert axes.get_ylim()[1] < 10
  assert "bars longer than the axis: a at 2 (4,000)" in told(axes)


@pytest.mark.parametrize("scale", [LOG, LINEAR, None])
def test_nothing_to_show(scale):
  empty, lost = Series("a", [], []), Series("a", [1.0], [math.nan])
  first, second = drawn(panel(empty, y=Axis("loss", scale)), panel(lost, y=Axis("loss", scale)))
  assert [axes.texts[0].get_text() for axes in (first, second)] == ["nothing to show"] * 2
  assert "not finite: " in told(second)


def test_no_panel_at_all():
  (text,) = plots.figure([]).texts
  assert text.get_text() == "nothing was measured"
  assert plots.png([])[:4] == b"\x89PNG"


def test_lines_are_drawn_where_they_are_said_to_be_and_named():
  series = Series("kind", [1.0, 2.0], [3.0, 4.0])
  curve = Line("formula", [1.0, 2.0], [3.1, 4.1], of="kind")
  level, upright = Line("bound", y=9.0), Line("length of training", x=1.5)
  (axes,) = drawn(panel(series, lines=[curve, level, upright, Line("bound", y=8.0)]))
  places = [line.get_xydata().tolist() for line in axes.lines[1:]]
  assert places[0] == [[1.0, 3.1], [2.0, 4.1]]
  assert [y for _, y in places[1]] == [9.0, 9.0] and [x for x, _ in places[2]] == [1.5, 1.5]
  assert axes.lines[1].get_color() == axes.lines[0].get_color()
  assert axes.get_ylim()[1] > 9
  assert [text.get_text() for text in axes.get_legend().get_texts()] == [
    "formula", "bound", "length of training"
  ]  # fmt: skip


def test_one_series_has_one_colour_in_all_panels():
  a, b = Series("a", [1], [1.0]), Series("b", [1], [1.0])
  first, second = drawn(panel(a, b), panel(b))
  assert first.lines[1].get_color() == second.lines[0].get_color()


def test_names_beside_points_cover_neither_points_nor_one_another():
  places = np.random.default_rng(0).normal(size=(2, 12))
  names = [f"technique-{i}" for i in range(12)]
  (axes,) = drawn(panel(Series("kind", *places, joined=False, names=names)))
  axes.figure.canvas.draw()
  boxes = [Text.get_window_extent(text) for text in axes.texts]
  inside = axes.get_window_extent()
  assert all(inside.x0 <= b.x0 and b.x1 <= inside.x1 for b in boxes)
  assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
  pixels = axes.transData.transform(places.T)
  assert not any(box.contains(*pixel) for box in boxes for pixel in pixels)


def test_labels_above_one_another_have_room():
  ticks = {float(-i): f"{i}: {LONG}" for i in range(20)}
  many = Series("a", [0.1] * 20, list(ticks), joined=False)
  (axes,) = drawn(panel(many, y=Axis("claim", LINEAR, ticks)))
  boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
  assert len(boxes) == 20
  assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_verdicts_over_seeds_are_drawn_with_their_intervals_and_bounds():
  claims = {
    "held": less([1.0, 1.1], [2.0, 2.2]),
    "not": less([2.0, 2.2], [1.0, 1.1]),
    "one seed": less([1.0], [2.0]),
    "alike": alike([1.0, 1.0], [1.1, 1.1], 0.2),
    "diverged": Verdict("undecided", "1 of 2 seeds diverged"),
    "exact": True,
  }
  (found,) = plots.differences("Verdicts", "nats a token", claims)
  assert [series.name for series in found.series] == ["held", "did NOT hold", "undecided"]
  (axes,) = drawn(found)
  labels = [label.get_text() for label in axes.get_yticklabels()]
  assert labels == ["held", "not", "one seed", "alike", "diverged"]
  assert sorted(line.x for line in found.lines) == [-0.2, 0.0, 0.2]
  (held, *_), (row, *_) = found.series[0].x, found.series[0].y
  assert (held, row) == (pytest.approx(-1.05), 0.0)
  assert found.series[2].spread == [None]
  assert plots.differences("Verdicts", "nats", {"exact": True}) == []
