"""Upcycling a tiny random model: what is the same at first, what is compared and claimed."""

import dataclasses
import types

import pytest

from effjax.train import workdir as files
from experiments.lab.verdicts import HELD, UNDECIDED
from experiments.moe import continued
from experiments.moe import upcycling as study

TINY = study.Config(
  model="tiny", text="stdlib", rows=1, length=16, batch=1, steps=1, seeds=1, every=2
)


def test_a_run_says_what_upcycling_keeps_and_gains(tmp_path):
  dense, upcycled = study.run(TINY, str(tmp_path))
  assert (dense["variant"], upcycled["variant"]) == (study.DENSE, study.UPCYCLED)
  assert dense["logits off"] == 0 and upcycled["logits off"] <= study.SAME
  assert upcycled["before"] == pytest.approx(dense["before"], abs=1e-4)
  assert upcycled["parameters"] > upcycled["active"] > dense["active"]
  assert upcycled["over"] == pytest.approx(upcycled["after"] - dense["after"])
  made = {path.name for path in tmp_path.iterdir()}
  assert {"metrics.jsonl", "plot.png", "result.csv", "provenance.json"} <= made
  claims = study.claims(files.read_rows(tmp_path / files.METRICS))
  assert claims["upcycled: at step 0 the logits are the dense model's to 1e-5 of the largest"]


def test_a_rate_is_swept_where_there_are_several():
  variants = list(study.variants(3).values())
  plan = lambda multiples: continued.planned(
    types.SimpleNamespace(run=dict), variants[:1], dict, multiples=multiples, seeds=2, folder=None
  )
  assert list(plan([1.0])) == ["dense: before", "dense: seed=0", "dense: seed=1"]
  assert list(plan([0.5, 2.0]))[1:3] == ["dense: rate × 0.5", "dense: rate × 2"]


def test_claims_are_paired_by_seed():
  rows = [
    {
      "variant": name,
      "kind": continued.RUNS,
      "rate": 1.0,
      "seed": seed,
      continued.NATS: paid + seed,
    }
    for name, paid in ((study.DENSE, 3.0), ("qwen", 2.5), ("drop", float("nan")))
    for seed in range(3)
  ]
  start = {continued.NATS: 6.0, "kind": continued.BEFORE, "logits off": 0.5}
  rows += [{"variant": name, **start} for name in (study.DENSE, "qwen", "drop")]
  claims = study.claims(rows)
  assert claims["qwen is better than the dense model after as many tokens"].word == HELD
  assert claims["drop is better than the dense model after as many tokens"].word == UNDECIDED
  assert continued.line(rows, "qwen", study.DENSE)["over"] == -0.5


def test_bad_input_is_named(tmp_path):
  for message, change in {
    "unknown variant 'soup'": {"variants": "soup"},
    "seeds=0; allowed: from 1": {"seeds": 0},
    "rates='x'": {"rates": "x"},
  }.items():
    with pytest.raises(ValueError, match=message):
      study.run(dataclasses.replace(TINY, **change), str(tmp_path))
