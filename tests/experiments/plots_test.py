"""The plots of all experiments: words, lines of verdicts, and rows that nobody hoped for."""

import functools
import json
import math
import re
from pathlib import Path

import pytest

from effjax.train import workdir
from experiments.attention import (
  attention_scaling,
  flash_io,
  pretrained_window,
  rapid_mixing,
  sparse_attention_lm,
)
from experiments.lab import learning_rates, plots
from experiments.parallel import zero_memory
from experiments.survey import pictures, techniques
from experiments.train import pretrain

RESULTS = Path(__file__).resolve().parents[2] / "results"
SWEEP = flash_io.sweeps(
  flash_io.Config(lengths="64,128", widths="4,8", memories="256,512", width=4)
)
SIZES = ("parameters", "active", "trainable", "bytes", "flops_token", "tokens")
TIMES = ("prefill_ratio", "decode_ratio")


def survey_rows(seeds=2):
  rows = []
  for i, technique in enumerate(techniques.TECHNIQUES):
    row = {"technique": technique.name, "kind": technique.kind, **dict.fromkeys(SIZES, 1e6 + i)}
    row |= dict.fromkeys(TIMES, 1 + i / 10) | {"nll": 2 + i / 50, "bits_byte": 1.0}
    if technique.trained:
      row["against"] = technique.against
      rows += [{**row, "seed": seed, "nll": row["nll"] + seed / 100} for seed in range(seeds)]
    else:
      rows.append(row)
  return rows


def sparse_rows(seeds=2):
  names = sparse_attention_lm.mixers(2, 16)
  curve = {"edges": [0, 2, 4, 8], "nll by position": [3.0, 2.0, None]}
  nll = lambda i, seed: {f"nll {t}": 3 + i / 9 + seed / 50 for t in sparse_attention_lm.TIMES}
  return [
    {"pattern": name, "seed": seed, "flops_token": 1e6, **nll(i, seed), **curve}
    for i, name in enumerate(names)
    for seed in range(seeds)
  ]


def rate_rows(seeds=2):
  return [
    {"rung": rung.name, "learning_rate": rate, "seed": seed, "tokens_per_parameter": 5.0,
     "processor": "abacus", "nll": 3 + rate + seed / 50, "bits_byte": 1.0}
    for rung in learning_rates.LADDER for rate in (2e-3, 4e-3, 8e-3) for seed in range(seeds)
  ]  # fmt: skip


def mixing_rows(seeds=2):
  return [
    {"pattern": name, "blocks": n, "seed": seed, "keys": 3.0, "mean path": n / 3, "longest": n - 1,
     "reached": 1.0, "gap": None if n > 64 else 1 / n}
    for name in rapid_mixing.PATTERNS for n in (32, 64, 128) for seed in range(seeds)
  ]  # fmt: skip


def window_rows():
  curve = [4.0, 3.0, 3.0, 2.0]
  row = lambda window, sinks, name: {"name": name, "window": window, "sinks": sinks, "nll": 3.0,
                                     "curve": [x + (window or 64) / 64 for x in curve]}  # fmt: skip
  rows = [row(None, 0, "full")]
  return rows + [row(w, s, f"{w} {s}") for w in (16, 32) for s in (0, 1, 2, 3, 4, 5, 6, 7, None)]


def scaling_rows():
  memory = lambda n: {"memory": [[name, n, 2**20 * n] for name in attention_scaling.KINDS]}
  time = [[name, n, 1e-3 * n] for name in attention_scaling.KINDS for n in (64, 128)]
  return [memory(64), memory(128), {"time": time}]


def traffic_rows():
  counts = lambda n, d, m: {"flash": n * n * d, "standard": n * n, "flash_formula": n * n * d,
                            "standard_formula": n * n}  # fmt: skip
  sizes = dict.fromkeys(size for sweep in SWEEP.values() for size in sweep)
  rows = [{"N": n, "d": d, "M": m, **counts(n, d, m)} for n, d, m in sizes]
  return rows + [flash_io.published(name) for name in flash_io.PUBLISHED]


def memory_rows():
  cells = [
    (s, p, dp)
    for dp in zero_memory.PUBLISHED
    for s in zero_memory.SIZES
    for p in zero_memory.STAGES
  ]
  placed = [
    {"stage": i, "device_bytes": 9e6 / (i + 1), "formula_bytes": 9e6 / (i + 1)} for i in range(4)
  ]
  return [zero_memory.cell(*x) for x in cells] + [{**row, "ratio": 1.0} for row in placed]


def step_rows():
  rows = [{"step": i, "nll": 7 - i / 50} for i in range(1, 101)]
  return [*rows, {"step": 101, "nll": 5.0, "validation_loss": 5.1}]


# Rows, what makes panels of them, the column that is damaged, and what the lines beneath say.
CASES = {
  "survey": (survey_rows, pictures.panels, "nll", ["2 % above dense", "± 0.1 %", "bound of the"]),
  "sparse_attention_lm": (sparse_rows, sparse_attention_lm.panels, "nll 1",
    ["full at the length", "1 % above the window", "bound of the verdict"]),
  "learning_rates": (rate_rows, learning_rates.panels, "nll", ["the ladder's rate for 0.8M"]),
  "rapid_mixing": (mixing_rows, rapid_mixing.panels, "longest",
    ["(N − 1) / w", "2 layers", "as 1 / N²", "line over log N", "all", "twice its least"]),
  "pretrained_window": (window_rows, pretrained_window.panels, "curve",
    ["twice the perplexity", "within 10 %", "5 % above reading afresh"]),
  "attention_scaling": (scaling_rows, functools.partial(
    attention_scaling.panels, names=list(attention_scaling.KINDS)), "time",
    ["N^1, to 0.25", "N^2, to 0.25"]),
  "flash_io": (traffic_rows, functools.partial(flash_io.panels, sizes=SWEEP), "flash",
    ["theorem 2", "equal traffic", "as printed", "to 10 %", "the formula"]),
  "zero_memory": (memory_rows, zero_memory.panels, "device_bytes",
    ["less than one unit off", "formula ± 1 %"]),
  "pretrain": (step_rows, functools.partial(pretrain.panels, floor=6.0), "nll",
    ["token frequencies"]),
}  # fmt: skip


def damaged(rows, column, value):
  """The last row that has the column, with another value there."""
  rows = json.loads(json.dumps(rows))
  row = [row for row in rows if column in row][-1]
  if column == "curve":
    row[column][-1] = value
  elif column == "time":
    row[column][-1][-1] = value
  else:
    row[column] = value
  return rows


def beneath(axes):
  """What stands beneath a panel."""
  legend = axes.get_legend()
  return [" ".join(text.get_text().split()) for text in legend.get_texts()] if legend else []


def inside(made):
  box = made.get_tightbbox()
  return (
    min(box.x0, box.y0) > -0.01
    and (box.x1, box.y1) <= tuple(made.get_size_inches() + 0.01)
    and made.legends[0].get_window_extent().width < made.bbox.width
  )


def legends(made):
  return [line.get_color() for line in made.legends[0].get_lines()]


@pytest.mark.parametrize("name", CASES)
def test_quantities_have_words_and_verdicts_their_lines(name):
  rows, panels, _, lines = CASES[name]
  found = panels(rows())
  made = plots.figure(found)
  said = " | ".join(text for axes in made.axes for text in beneath(axes))
  assert [words for words in lines if words not in said] == []
  for panel in found:
    assert all(re.search(r"[a-z]{4}", axis.words) for axis in (panel.x, panel.y))
  assert inside(made)
  assert len(set(legends(made))) == len(legends(made))


@pytest.mark.parametrize("value", [3e3, math.nan, math.inf, 0.0])
@pytest.mark.parametrize("name", CASES)
def test_one_value_that_nobody_hoped_for(name, value):
  rows, panels, column, _ = CASES[name]
  found = panels(damaged(rows(), column, value))
  assert len(found) == len(panels(rows()))
  if math.isnan(value):
    made = plots.figure(found)
    assert inside(made)
    assert any(text.startswith("not finite: ") for axes in made.axes for text in beneath(axes))


@pytest.mark.parametrize(
  ("rows", "panels"),
  [
    (survey_rows, pictures.panels),
    (sparse_rows, sparse_attention_lm.panels),
    (rate_rows, learning_rates.panels),
    (mixing_rows, rapid_mixing.panels),
  ],
)
def test_one_seed_has_no_spread(rows, panels):
  barred = [panel for panel in panels(rows(seeds=1)) if panel.bars]
  assert barred
  for panel in barred:
    assert all(spread is None for series in panel.series for spread in series.spread)
  made = plots.figure(barred[:1])
  assert "no bars: one seed" in beneath(made.axes[0])


def test_a_new_kind_of_technique_has_a_colour_of_its_own():
  new = {**survey_rows()[0], "technique": "new", "kind": "kernel"}
  made = plots.figure(pictures.panels([*survey_rows(), new]))
  assert "kernel" in [text.get_text() for text in made.legends[0].get_texts()]
  assert len(set(legends(made))) == len(legends(made)) >= 8


def test_more_sinks_than_colours_are_all_drawn():
  behind, along = pretrained_window.panels(window_rows())
  assert len(behind.series) == 9 and len(along.series) == 10


@pytest.mark.parametrize(
  ("folder", "panels"),
  [("survey", pictures.panels), ("learning_rates", learning_rates.panels)],
)
def test_committed_rows_are_drawn_whole(folder, panels):
  made = plots.figure(panels(workdir.read_rows(RESULTS / folder / workdir.METRICS)))
  assert inside(made)
