"""Plots of how a mixture's experts are used in training."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def loads(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
  """Layer → the shares of choices that fell on each expert, [steps, E].

  Args:
    rows: one a step, with "…/load" as routers sow it and `run` writes it to metrics.jsonl.

  Raises:
    ValueError: where there is no load, or not the same ones in every row.

  Example:
    >>> found = loads([{"ffn/router/load": [[0.5, 0.5], [1.0, 0.0]]}])
    >>> {layer: load.tolist() for layer, load in found.items()}
    {'ffn/router 0': [[0.5, 0.5]], 'ffn/router 1': [[1.0, 0.0]]}
  """
  names = sorted({name for row in rows for name in row if name.rpartition("/")[2] == "load"})
  if not names:
    raise ValueError("plot_load: rows have no load; allowed: metrics of a model with routers")
  if lacking := [name for name in names if any(name not in row for row in rows)]:
    raise ValueError(f"plot_load: {lacking[0]} is not in every row; allowed: rows of one model")
  found = {}
  for name in names:
    layer, load = name.rpartition("/")[0], np.array([row[name] for row in rows], float)
    if load.ndim == 2:
      found[layer] = load
    else:
      found |= {f"{layer} {i}": load[:, i] for i in range(load.shape[1])}
  return found


def plot_load(rows: Sequence[Mapping[str, Any]]):
  """A figure of E · f, the load over the mean load, by expert and step: a panel for each layer.

  White is an even load of 1, blue less and red more.

  Args:
    rows: as in `loads`; "step", where they have it, is written below.

  Raises:
    ValueError: as `loads`.
  """
  import matplotlib.pyplot as plt

  layers = loads(rows)
  steps = [row.get("step", place) for place, row in enumerate(rows)]
  columns = min(len(layers), 4)
  figure, axes = plt.subplots(
    math.ceil(len(layers) / columns), columns, squeeze=False, layout="constrained"
  )
  for panel in axes.flat[len(layers) :]:
    panel.set_axis_off()
  for panel, (layer, load) in zip(axes.flat, layers.items(), strict=False):
    experts = load.shape[1]
    extent = (steps[0], max(steps[-1], steps[0] + 1), experts - 0.5, -0.5)
    drawn = panel.imshow(
      experts * load.T, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", extent=extent
    )
    panel.set(title=layer, xlabel="step", ylabel="expert")
  figure.colorbar(drawn, ax=axes, label="choices over those of the mean expert", extend="max")
  return figure
