"""The plot of load by layer and step."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from effjax.moe import plot_load


def test_a_panel_for_each_layer_shows_each_expert_at_each_step():
  stacked = np.random.default_rng(0).dirichlet(np.ones(4), (6, 2))
  single = np.random.default_rng(1).dirichlet(np.ones(2), 6)
  rows = [
    {
      "step": 10 * i,
      "loss": 1.0,
      "a/router/load": stacked[i].tolist(),
      "b/load": single[i].tolist(),
    }
    for i in range(6)
  ]
  figure = plot_load(rows)
  panels = {panel.get_title(): panel for panel in figure.axes if panel.get_title()}
  assert list(panels) == ["a/router 0", "a/router 1", "b"]
  np.testing.assert_allclose(panels["a/router 1"].images[0].get_array(), 4 * stacked[:, 1].T)
  np.testing.assert_allclose(panels["b"].images[0].get_array(), 2 * single.T)
  assert panels["b"].images[0].get_extent() == [0, 50, 1.5, -0.5]
  plt.close(figure)


def test_rows_without_a_load_or_of_several_models():
  with pytest.raises(ValueError, match="rows have no load"):
    plot_load([{"step": 1, "loss": 2.0}])
  with pytest.raises(ValueError, match="a/load is not in every row"):
    plot_load([{"a/load": [0.5, 0.5]}, {"b/load": [0.5, 0.5]}])
