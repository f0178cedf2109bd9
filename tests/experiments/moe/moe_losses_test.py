"""Losses on the load of experts: a small run, and what is said of rows made by hand."""

import dataclasses
import functools
import math

import numpy as np
import pytest

from effjax import data, moe
from effjax.core import trees
from experiments.lab import training
from experiments.lab.sizes import Rung
from experiments.lab.study import Study
from experiments.lab.verdicts import HELD, NOT_HELD, UNDECIDED
from experiments.moe import moe_losses
from experiments.moe.moe_losses import (
  BALANCE,
  CHOICES,
  CONTROLS,
  EXPERTS,
  FREE,
  NONE,
  Config,
  claims,
  dead,
  panels,
  routers,
)

RUNG = Rung("tiny", 16, 2, 2, batch=2, learning_rate=1e-2, vocab=300, length=16)


def row(loss, seed, nll, load, dying=0.0):
  share = load / EXPERTS
  layer = [share] + [(1 - share) / (EXPERTS - 1)] * (EXPERTS - 1)
  return {
    "loss": loss, "seed": seed, "nll": nll, "nll with capacity": nll + load / 10, "max_load": load,
    "load_entropy": 2.0, "dead_experts": dying, "dropped_share": 0.1,
    "load": [[32, layer, layer], [64, layer, layer]],
  }  # fmt: skip


def rows(seeds=3, free=1.2):
  """One loss better than its control, by load and in quality alike; the others as those."""
  even = {BALANCE: 1.3, FREE: free}
  return [
    row(name, seed, 3 + seed / 9 - (name == FREE) / 20, even.get(name, 2.0) + seed / 99,
        2.0 + seed / 9 if name == NONE else 0.0)
    for name in routers(Config()) for seed in range(seeds)
  ]  # fmt: skip


@pytest.mark.slow
def test_training_notes_the_load_of_every_layer_and_moves_the_bias(tmp_path, monkeypatch):
  monkeypatch.setattr(training, "PER_CALL", 2)
  monkeypatch.setattr(Study, "steps", lambda self, run: 3)
  corpus = data.text("embedded")
  study = Study(RUNG, corpus, tokens_per_parameter=1.0, seeds=range(2), folder=tmp_path)
  move = functools.partial(moe.move_bias, speed=0.5)
  found = moe_losses.trained(study, study.held_out(4), FREE, routers(Config())[FREE], move)
  for each in found:
    assert abs(each["nll"] - math.log(300)) < 0.5
    assert 1 <= each["max_load"] <= EXPERTS / CHOICES
    assert each["load_entropy"] <= math.log(EXPERTS) and 0 <= each["dropped_share"] < 1
    assert [step for step, *_ in each["load"]] == [2, 3]
    shares = np.array([layers for _, *layers in each["load"]])
    assert shares.shape == (2, RUNG.layers, EXPERTS)
    np.testing.assert_allclose(shares.sum(axis=-1), 1, atol=1e-3)
  trained = trees.items(study.trained(FREE, None).params)
  (bias,) = (np.asarray(x) for path, x in trained.items() if path.endswith("router/bias"))
  # Three steps up or down, of which one that finds its expert's load even would be none.
  assert bias.shape == (2, RUNG.layers, EXPERTS)
  assert set(np.unique(np.abs(bias))) <= {0.0, 0.5, 1.0, 1.5} and np.abs(bias).max() > 0
  assert not (bias[0] == bias[1]).all()


def test_a_run_has_a_line_a_loss_and_resumes(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(moe_losses.budget, "largest", lambda *_, **__: RUNG)
  by_hand = lambda study, text, name, router, after: [r for r in rows() if r["loss"] == name]
  monkeypatch.setattr(moe_losses, "trained", by_hand)
  monkeypatch.setattr(Study, "held_out", lambda *_: None)
  config = Config(losses="deepseek,none", text="embedded", seeds=3, rows=2)
  lines = moe_losses.run(config, str(tmp_path))
  assert [line["loss"] for line in lines] == [NONE, BALANCE]
  for name in ("config.json", "metrics.jsonl", "result.csv", "plot.png", "provenance.json"):
    assert (tmp_path / name).stat().st_size > 0
  assert moe_losses.run(config, str(tmp_path)) == lines
  assert "held:         without any loss, experts die (-2.1" in capsys.readouterr().out


def test_every_loss_stands_beside_the_same_router_without():
  off = {"load_balance", "z", "mutual_information", "importance", "load", "normalization"}
  known = routers(Config())
  assert set(known) == set(CONTROLS) | set(CONTROLS.values())
  for name, control in CONTROLS.items():
    ours, theirs = known[name], known[control]
    assert type(ours) is type(theirs)
    fields = [f.name for f in dataclasses.fields(ours) if f.name not in ("parent", "name")]
    differ = {f for f in fields if getattr(ours, f) != getattr(theirs, f)}
    assert differ <= off and bool(differ) == (name != FREE)
    assert not any(getattr(theirs, f, 0) for f in off - {"normalization"})


def test_claims_are_judged_over_seeds():
  found = {claim: verdict.word for claim, verdict in claims(rows()).items()}
  assert found["without any loss, experts die"] == HELD
  assert found["deepseek evens the load of none"] == HELD
  assert found["switch evens the load of none"] == NOT_HELD
  assert "z evens the load of none" not in found
  assert found["loss-free is as even as deepseek, to 10%"] == HELD
  assert found["loss-free predicts better than deepseek"] == HELD
  assert found["z costs at most 1% of the perplexity of none"] == HELD
  assert found["with a capacity of 1.25, deepseek predicts better than none"] == HELD
  uneven = {claim: verdict.word for claim, verdict in claims(rows(free=2.0)).items()}
  assert uneven["loss-free is as even as deepseek, to 10%"] == NOT_HELD
  assert UNDECIDED in {verdict.word for verdict in claims(rows(seeds=1)).values()}
  assert claims([r for r in rows() if r["loss"] == "z"]) == {}


def test_an_expert_is_dead_that_gets_less_than_a_hundredth_of_its_share():
  even = np.full((2, EXPERTS), 1 / EXPERTS)
  assert dead(even) == 0
  even[0, :3] = [0.0, 0.009 / EXPERTS, 0.011 / EXPERTS]
  assert dead(even) == 1.0  # two of one layer, none of the other


def test_a_panel_a_layer_is_drawn_from_the_rows_alone():
  made = panels(rows())
  assert [panel.title for panel in made] == [
    "Layer 1 while it trains",
    "Layer 2 while it trains",
    "Balance and quality",
    "Verdicts on the load",
    "Verdicts on quality",
  ]
  first = next(series for series in made[0].series if series.name == BALANCE)
  assert first.x == [32, 64] and first.y == pytest.approx([1.3 + 1 / 99] * 2)


def test_an_unknown_loss_is_refused(tmp_path):
  with pytest.raises(ValueError, match="unknown loss 'x'; allowed: all, none, deepseek, switch"):
    moe_losses.run(Config(losses="x"), str(tmp_path))
