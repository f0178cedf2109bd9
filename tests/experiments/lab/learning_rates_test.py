"""The sweep on a tiny ladder, and the committed one against the ladder that is used."""

import math
from pathlib import Path

import pytest

from effjax.train import workdir
from experiments.lab import learning_rates
from experiments.lab.learning_rates import Config, best, claims, summarize
from experiments.lab.sizes import LADDER, Rung

RESULTS = Path(__file__).resolve().parents[3] / "results" / "learning_rates"
RUNG = Rung("0.1M", 16, 1, 2, batch=2, learning_rate=1e-2, vocab=280, length=16)


def row(rung, rate, nll, seed=0):
  shared = {"tokens_per_parameter": 5.0, "processor": "abacus", "bits_byte": 1.0}
  return {"rung": rung, "learning_rate": rate, "seed": seed, "nll": nll, **shared}


@pytest.mark.slow
def test_a_sweep_trains_every_rate_and_seed(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(learning_rates, "LADDER", (RUNG,))
  sizes = {"tokens_per_parameter": 0.05, "text": "embedded", "rows": 2}
  rows = learning_rates.run(Config(rungs="0.1M", rates="1e-4,1e-2", **sizes), str(tmp_path))
  assert [(r["learning_rate"], r["seed"]) for r in rows] == [
    (1e-4, 0),
    (1e-4, 1),
    (1e-2, 0),
    (1e-2, 1),
  ]
  assert best(summarize(rows)) == {"0.1M": 1e-2}
  assert "held:         0.1M: 0.01 is best, as the ladder has it" in capsys.readouterr().out
  for name in ("config.json", "metrics.jsonl", "result.csv", "plot.png", "provenance.json"):
    assert (tmp_path / name).stat().st_size > 0


def test_the_best_rate_pays_least_over_seeds_and_never_diverges():
  rows = [row("a", 0.1, 2.0), row("a", 0.1, 4.0, 1), row("a", 0.2, 2.9), row("a", 0.2, 2.9, 1)]
  rows += [row("a", 0.4, math.nan), row("b", 0.1, 1.0)]
  assert best(summarize(rows)) == {"a": 0.2, "b": 0.1}


def test_a_rate_at_the_edge_of_what_was_tried_is_told():
  lines = summarize([row(LADDER[0].name, rate, 1 / rate) for rate in (0.1, 0.2)])
  assert list(claims(lines).values()) == [LADDER[0].learning_rate == 0.2, False]


@pytest.mark.parametrize("rates", ["", "a", "0,1e-3"])
def test_rates_that_are_none_are_refused(rates, tmp_path):
  with pytest.raises(ValueError, match="rates="):
    learning_rates.run(Config(rates=rates), str(tmp_path))


def test_the_ladder_has_the_rates_that_the_committed_sweep_found():
  swept = best(summarize(workdir.read_rows(RESULTS / workdir.METRICS)))
  used = {rung.name: rung.learning_rate for rung in LADDER}
  assert swept == {name: used[name] for name in swept}
  above = [rung for rung in LADDER if rung.name not in swept]
  assert list(LADDER[: len(swept)]) == [rung for rung in LADDER if rung.name in swept]
  assert {rung.learning_rate for rung in above} <= {LADDER[len(swept) - 1].learning_rate}
