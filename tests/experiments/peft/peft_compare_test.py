"""Methods compared on tiny random models: what is read, kept, chosen and claimed."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from effjax.core import trees
from effjax.peft import IA3
from effjax.train import workdir as files
from experiments.lab.verdicts import UNDECIDED
from experiments.peft import peft_compare as study
from experiments.peft.methods import METHODS
from experiments.peft.tasks import Continuing
from experiments.peft.trials import SWEPT, Trials
from tests.entries import store

TINY = study.Config(
  tasks="ask", methods="lora", encoder="tiny", decoder="tiny", text="stdlib", rows=2, length=24,
  batch=2, entries=6, queries=5, words=12, group=4, steps=2, asked=2, rates="1", turns=1,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def texts(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("EFFJAX_CACHE", str(store(tmp_path_factory.mktemp("cache"))))
    yield


def test_a_run_resumes_and_grows_by_a_seed(tmp_path):
  one = dataclasses.replace(TINY, seeds=1)
  rows = study.run(one, str(tmp_path))
  assert [row["method"] for row in rows] == [study.AS_IT_IS, "lora"]
  before = (tmp_path / "metrics.jsonl").read_text()
  measured = files.read_rows(tmp_path / "metrics.jsonl")
  kinds = [row["kind"] for row in measured]
  assert kinds == ["runs", "costs", "rates", "runs"]
  assert {row["seed"] for row in measured if row["kind"] == "rates"} == {SWEPT}
  rows = study.run(dataclasses.replace(one, seeds=2), str(tmp_path))
  assert (tmp_path / "metrics.jsonl").read_text().startswith(before)
  assert rows[1]["± seeds"] is not None and rows[1]["step ×"] == 1
  made = {path.name for path in tmp_path.iterdir()}
  assert {"config.json", "result.csv", "plot.png"} <= made
  assert (tmp_path / "ask" / "provenance.json").exists()


def test_what_trains_is_counted_with_both_moments():
  trials = study.trials_of(TINY, "continue")
  kept = trials.keeps(METHODS["ia3"])
  subject = METHODS["ia3"](trials.task.subject, jax.random.key(0))
  scales = [leaf.scale for leaf in trees.items(subject.params).values() if isinstance(leaf, IA3)]
  trained = sum(scale.size for scale in scales)
  assert kept["trained"] == trained
  assert kept["trained_bytes"] == 4 * trained
  assert 0 <= kept["state_bytes"] - 3 * 4 * trained < 64  # counts of steps, and the rate
  assert kept["share"] == trained / trees.count(trials.task.subject.params)


def test_virtual_tokens_predict_nothing_that_counts():
  task = Continuing("tiny", "stdlib", rows=2, length=24, batch=2)
  method = METHODS["soft-prompt"]
  params = method(task.subject, jax.random.key(0)).params
  plain, read = (next(task.batches(each, params, 3)) for each in (METHODS["lora"], method))
  assert read["tokens"].shape[1] > plain["tokens"].shape[1]
  own = read["tokens"] < task.subject.config.vocab_size
  assert (read["weights"][~own] == 0).all()
  np.testing.assert_array_equal(
    read["targets"][own & (read["weights"] > 0)], plain["targets"][plain["weights"] > 0]
  )


def rows(task, method, scores, *, rate=1.0, sign=1, kind="runs", seeds=None):
  base = {"task": task, "method": method, "kind": kind, "metric": "m", "sign": sign}
  seeds = range(len(scores)) if seeds is None else seeds
  return [base | {"seed": s, "rate": rate, "m": m} for s, m in zip(seeds, scores, strict=True)]


def made_up(**scores):
  found = rows("t", study.AS_IT_IS, [3.0], seeds=[None])
  for method, each in scores.items():
    found += rows("t", method, [each[0]], kind="rates", seeds=[SWEPT])
    found += rows("t", method, each)
  return found


def test_claims_are_paired_by_seed():
  found = made_up(lora=[2.0, 2.2, 2.4], dora=[1.9, 2.1, 2.3], ia3=[2.1, 2.31, 2.52])
  said = {claim: verdict.word for claim, verdict in study.claims(found).items()}
  assert said["t: dora is better than LoRA"] == "held"
  assert said["t: ia3 is better than LoRA"] == "did NOT hold"
  assert said["t: lora is better than no training"] == "held"
  lines = {line["method"]: line for line in study.summary(found)}
  assert lines["dora"]["over LoRA"] == pytest.approx(0.1)
  assert lines["dora"]["gain"] == pytest.approx(0.9)
  assert lines[study.AS_IT_IS]["score"] == 3.0


def test_scores_that_rise_are_better_when_higher():
  found = rows("t", study.AS_IT_IS, [0.2], sign=-1, seeds=[None])
  for method, scores in {"lora": [0.3, 0.31], "full": [0.4, 0.41]}.items():
    found += rows("t", method, scores, sign=-1)
    for rate, score in ((1.0, 0.1), (2.0, 0.9), (4.0, math.nan)):
      found += rows("t", method, [score], rate=rate, sign=-1, kind="rates", seeds=[SWEPT])
  assert study.claims(found)["t: full is better than LoRA"].word == "held"
  assert study.Found(found).rate("t", "full") == 2.0
  full = study.summary(found)[2]
  assert full["gain"] == pytest.approx(0.205) and full["over LoRA"] == pytest.approx(0.1)
  assert [panel.title for panel in study.panels(found)][-1] == "Verdicts"


def test_a_run_that_diverged_decides_nothing():
  found = made_up(lora=[2.0, 2.2], full=[1.0, math.nan])
  assert study.claims(found)["t: full is better than LoRA"].word == UNDECIDED
  assert "over LoRA" not in study.summary(found)[-1]


def test_a_loss_that_is_not_finite_ends_a_run(monkeypatch):
  trials = Trials(Continuing("tiny", "stdlib", rows=2, length=24, batch=2), 5)
  monkeypatch.setattr(trials, "_taken", lambda config, state, batch: (state, math.nan))
  assert len(trials.trained(METHODS["ia3"], 1.0, 0)[1]) == 1


@pytest.mark.parametrize(
  ("message", "change"),
  [
    ("unknown task 'translate'", {"tasks": "translate"}),
    ("unknown method 'qlora'", {"methods": "qlora"}),
    ("seeds=0; allowed: from 1", {"seeds": 0}),
    ("rates='fast'", {"rates": "fast"}),
  ],
)
def test_bad_input_is_named(tmp_path, message, change):
  with pytest.raises(ValueError, match=message):
    study.run(dataclasses.replace(TINY, **change), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
