"""Patterns, means over draws, judgements of known laws, and a small run."""

import math

import numpy as np
import pytest

from experiments.attention import rapid_mixing

TINY = rapid_mixing.Config(blocks="32,64,128", sources=8, spectrum=64, seeds=2)


@pytest.mark.parametrize("name", rapid_mixing.DRAWN)
def test_draws_differ(name):
  dense = [np.asarray(rapid_mixing.PATTERNS[name](40, seed).dense(40)) for seed in (0, 0, 1)]
  assert (dense[0] == dense[1]).all()
  assert (dense[0] != dense[2]).any()


def test_all_starts_give_the_exact_diameter():
  config = rapid_mixing.Config(sources=64)
  row = rapid_mixing.measured("window + dilated", 64, 0, config)
  assert row["longest"] == math.ceil((63 - 4) / 8) + 4 - 1  # by eights, and at most 4 by ones
  few = rapid_mixing.measured("window + dilated", 64, 0, rapid_mixing.Config(sources=3))
  assert few["longest"] == row["longest"]


def test_means_and_deviations_over_seeds():
  same = {"pattern": "bigbird", "blocks": 8, "keys": 1.0, "mean path": 1.0, "reached": 1.0}
  one, other = {**same, "longest": 2, "gap": None}, {**same, "longest": 4, "gap": None}
  (row,) = rapid_mixing.summarize([one, other])
  assert row["longest"] == 3
  assert row["±"] == pytest.approx(math.sqrt(2))
  assert row["gap"] is None and row["gap ±"] is None
  (row,) = rapid_mixing.summarize([{**one, "gap": 0.5}])
  assert row["gap"] == 0.5 and row["±"] is None


def test_laws():
  assert rapid_mixing.slope([1, 2, 4], [8, 2, 0.5]) == pytest.approx(-2)
  assert rapid_mixing.off_a_line(np.array([1, 2, 3]), [5.0, 7.0, 9.0]) < 1e-12
  assert rapid_mixing.off_a_line(np.array([1, 2, 3]), [0.0, 3.0, 0.0]) == pytest.approx(2)


@pytest.mark.parametrize("text", ["", "64,128", "64,128,x", "4,64,128", "64,64,128"])
def test_sizes_that_give_no_line_are_refused(text, tmp_path):
  with pytest.raises(ValueError, match=r"blocks=.*; allowed: three or more integers from 8"):
    rapid_mixing.run(rapid_mixing.Config(blocks=text), str(tmp_path / "run"))


def test_a_run_measures_and_resumes(tmp_path, capsys):
  rows = rapid_mixing.run(TINY, str(tmp_path))
  assert len(rows) == 3 * len(rapid_mixing.PATTERNS)
  said = capsys.readouterr().out
  assert "held:         a window of w on each side needs (N − 1)/w layers" in said
  assert "did NOT hold: every pattern connects every pair" in said
  for name in ("config.json", "metrics.jsonl", "result.csv", "plot.png"):
    assert (tmp_path / name).stat().st_size > 0
  assert rapid_mixing.run(TINY, str(tmp_path)) == rows
