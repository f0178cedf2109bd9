"""Ranks and scales of LoRA on a tiny random model, and what is claimed of them."""

import dataclasses
import math

import jax
import pytest

from effjax.core import trees
from experiments.lab.subject import load
from experiments.peft import lora_rank as study
from experiments.peft.trials import SWEPT
from tests.entries import store

TINY = study.Config(
  encoder="tiny", ranks="1,2", swept=1, rates="1", entries=6, queries=5, words=12, batch=4, steps=1,
  seeds=1,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def texts(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("EFFJAX_CACHE", str(store(tmp_path_factory.mktemp("cache"))))
    yield


def test_a_run_has_a_line_a_scale_and_rank(tmp_path, monkeypatch):
  scored = lambda trials, method, rate, seed: {"rate": rate, "seed": seed, "nats": 1.0, "mrr": 0.5}
  monkeypatch.setattr(study.Trials, "run", scored)
  monkeypatch.setattr(study.Trials, "as_it_is", lambda trials: {"nats": 2.0})
  rows = study.run(TINY, str(tmp_path))
  assert [(row["scale"], row["rank"]) for row in rows] == [
    (scale, rank) for scale in study.SCALES for rank in (1, 2)
  ]
  assert rows[1]["trained"] == 2 * rows[0]["trained"]
  assert rows[0]["trained MB"] == 4 * rows[0]["trained"] / 1e6
  assert [row["rate"] for row in rows] == [1e-3] * 4
  assert {"metrics.jsonl", "plot.png", "result.csv"} <= {path.name for path in tmp_path.iterdir()}


def test_scales_are_those_of_the_papers():
  subject, _ = load("tiny")
  change = lambda scale, params: (
    study.method(scale, 4)(dataclasses.replace(subject, params=params), jax.random.key(0)).params
  )
  for scale, wanted in ((study.LORA, 16 / 4), (study.RSLORA, 16 / 2)):
    found = trees.select(change(scale, subject.params), r"query/kernel$")
    assert {float(w.scale.ravel()[0]) for w in found.values()} == {wanted}


def made_up(paid):
  found = [{"name": "as it is", "nats": 5.0}]
  for scale, ranks in paid.items():
    sizes = {"trained": 1, "trained_bytes": 4, "mrr": 0.5, "rate": 1.0}
    found += [
      sizes | {"scale": scale, "rank": rank, "seed": seed, "nats": nats}
      for rank, values in ranks.items()
      for seed, nats in enumerate(values)
    ]
    swept = sizes | {"scale": scale, "rank": 4, "seed": SWEPT}
    found += [swept | {"rate": r, "nats": x} for r, x in ((1.0, 4.0), (2.0, 3.0), (9.0, math.nan))]
  return found


def test_claims_are_of_the_lowest_and_the_highest_rank():
  found = made_up(
    {
      study.LORA: {1: [3.0, 3.1, 3.2], 8: [9.0, 9.0, 9.0], 64: [3.01, 3.1, 3.21]},
      study.RSLORA: {1: [3.0, 3.1, 3.2], 64: [2.5, 2.61, 2.7]},
    }
  )
  said = {claim: verdict.word for claim, verdict in study.claims(found).items()}
  assert said == {
    "α/r: rank 1 is within 0.05 nats of rank 64": "held",
    "α/r: rank 64 is better than rank 1": "undecided",
    "α/√r: rank 1 is within 0.05 nats of rank 64": "did NOT hold",
    "α/√r: rank 64 is better than rank 1": "held",
    "rank 64: α/√r is better than α/r": "held",
  }
  assert study.best(found, study.LORA) == 2.0
  lines = study.summary(found)
  assert lines[0]["nats"] == pytest.approx(3.1) and lines[0]["± seeds"] == pytest.approx(0.1)
  assert [panel.title for panel in study.panels(found)][:2] == [
    "What ranks reach",
    "What bytes reach",
  ]


@pytest.mark.parametrize(
  ("message", "change"),
  [
    ("ranks='0,4'; allowed: two or more integers from 1", {"ranks": "0,4"}),
    ("swept=0; allowed: from 1", {"swept": 0}),
  ],
)
def test_bad_input_is_named(tmp_path, message, change):
  with pytest.raises(ValueError, match=message):
    study.run(dataclasses.replace(TINY, **change), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
