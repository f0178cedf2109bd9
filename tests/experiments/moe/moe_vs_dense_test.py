"""Mixtures that are compared with a dense model: what they cost, and what is claimed of them."""

import math

import pytest

from effjax import cost
from experiments.lab.budget import Budget, Spending
from experiments.lab.sizes import LADDER, Rung, parameters
from experiments.lab.study import Study
from experiments.lab.verdicts import HELD, NOT_HELD, UNDECIDED
from experiments.moe import moe_vs_dense
from experiments.moe.mixtures import SMALLEST
from experiments.moe.moe_vs_dense import (
  BETTER,
  DENSE,
  FINER,
  MIXTURES,
  MORE,
  NAMES,
  THIN,
  Config,
  claims,
  panels,
  summarize,
)

RUNG = Rung("tiny", 24, 1, 2, batch=2, learning_rate=1e-2, vocab=300, length=16)


def row(model, nll, seed=0):
  design = MIXTURES.get(model)
  sizes = {"experts": design.experts, "top_k": design.top_k, "parts": design.parts} if design else {
    "experts": 1, "top_k": 1, "parts": 1}  # fmt: skip
  costs = {"tokens": 1e6, "parameters": 1e6, "active": 1e6, "flops_token": 1e6}
  return {"model": model, "seed": seed, "nll": nll, "bits_byte": nll / 2, **sizes, **costs}


@pytest.mark.parametrize("rung", (SMALLEST, *LADDER), ids=lambda rung: rung.name)
def test_a_token_costs_what_it_does_in_the_dense_model_and_the_router(rung):
  dense = rung.config()
  for name, design in MIXTURES.items():
    found = cost.flops(design.of(dense), rung.length)
    router = 2 * rung.width * design.experts * rung.layers
    mlps = 2 * 3 * rung.width * dense.layers[0].ffn.width * rung.layers
    unused = mlps / 2 if name == THIN else 0  # two of four experts
    assert found == cost.flops(dense, rung.length) + router - unused, name


def test_parameters_are_as_many_where_that_is_said():
  budget, dense = Budget(SMALLEST, 1.0), SMALLEST.config()
  steps = budget.steps(dense, Spending(equal="parameters"))
  assert budget.steps(MIXTURES[THIN].of(dense), Spending(equal="parameters")) == steps
  held = {name: (x.experts + x.shared) / x.parts for name, x in MIXTURES.items()}
  for better, worse, words in BETTER:
    assert held[better] == held[worse] * (2 if words == MORE else 1)
    if words == FINER:
      assert MIXTURES[better].parts > MIXTURES[worse].parts
  shared, apart = (parameters(MIXTURES[name].of(dense)) for name in ("31x3+1", "32x4"))
  assert apart - shared == SMALLEST.width * SMALLEST.layers  # one column of each router


def test_a_run_has_a_line_a_model_and_resumes(tmp_path, monkeypatch):
  monkeypatch.setattr(moe_vs_dense, "largest", lambda *_, **__: RUNG)
  monkeypatch.setattr(Study, "trained", lambda self, name, run: run.subject)
  config = Config(models=THIN, text="embedded", seeds=2, rows=2, tokens_per_parameter=1.0)
  (row,) = rows = moe_vs_dense.run(config, str(tmp_path))
  assert row["model"] == THIN and row["active M"] < row["params M"]
  # Nothing was trained: the uniform guess is log(vocabulary).
  assert abs(row["nats/token"] - math.log(300)) < 0.5
  tokens = Budget(RUNG, 1.0).tokens  # those of the dense model, in whole steps
  assert abs(1e6 * row["Mtokens"] - tokens) <= RUNG.batch * RUNG.length / 2
  for name in ("config.json", "metrics.jsonl", "result.csv", "plot.png", "provenance.json"):
    assert (tmp_path / name).stat().st_size > 0
  assert moe_vs_dense.run(config, str(tmp_path)) == rows


def test_claims_are_judged_over_seeds():
  each = lambda model, *values: [row(model, x, seed) for seed, x in enumerate(values)]
  good = each(DENSE, 3.3, 3.4) + each("8x1", 3.2, 3.31) + each("16x2", 3.1, 3.2)
  good += each(THIN, 3.5, 3.61)
  found = {claim: verdict.word for claim, verdict in claims(good).items()}
  assert found == {
    "at equal FLOPs, 8x1 predicts better than dense": HELD,
    "at equal FLOPs, 16x2 predicts better than dense": HELD,
    "at equal parameters and tokens, dense predicts better than thin-4x2": HELD,
    "at equal FLOPs, finer experts are better: 16x2 than 8x1": HELD,
  }
  bad = each("32x4", 3.1, 3.2) + each("31x3+1", 3.2, 3.3)
  assert [verdict.word for verdict in claims(bad).values()] == [NOT_HELD]
  gone = each(DENSE, 3.3, 3.4) + each("8x1", 3.2, math.nan)
  assert [verdict.word for verdict in claims(gone).values()] == [UNDECIDED]
  assert "over dense" not in summarize(gone)[1]


def test_lines_are_means_and_differences_to_the_dense_model():
  measured = [row(name, 3 - i / 10 + seed / 9, seed) for i, name in enumerate(NAMES)
              for seed in range(2)]  # fmt: skip
  lines = summarize(measured)
  assert [line["model"] for line in lines] == list(NAMES)
  assert "over dense" not in lines[0]
  assert lines[2]["over dense"] == pytest.approx(-0.2)
  numbers, grain, sizes, verdicts = panels(measured)
  assert [list(series.x) for series in numbers.series] == [[4, 8, 16]] * 2
  assert [list(series.x) for series in grain.series] == [[1, 2], [1, 2, 4], [4]]
  assert sizes.series[0].names == list(NAMES)
  assert len(verdicts.y.ticks) == len(claims(measured)) == 17


def test_an_unknown_model_is_refused(tmp_path):
  with pytest.raises(ValueError, match="unknown model '9x9'; allowed: all, dense, 4x1"):
    moe_vs_dense.run(Config(models="9x9"), str(tmp_path))
