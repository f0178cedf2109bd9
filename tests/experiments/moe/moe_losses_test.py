"""Losses on the load of experts: a small run, and what is said of rows made by hand."""

import dataclasses
import json
import math

import numpy as np
import pytest

from effjax import data
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

RUNG = Rung("tiny", 16, 1, 2, batch=2, learning_rate=1e-2, vocab=300, length=16)


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


def test_what_is_measured_of_a_model(tmp_path, monkeypatch):
  corpus = data.text("embedded")
  study = Study(RUNG, corpus, tokens_per_parameter=1.0, seeds=range(2), folder=tmp_path)
  subjects = []
  trained = lambda self, name, run: subjects.append(run.subject) or run.subject
  monkeypatch.setattr(Study, "trained", trained)
  during = np.arange(2.0 * EXPERTS).reshape(2, 1, EXPERTS)
  history = [{"step": 5, "losses": [1.0, 2.0], "a/router/load": during.tolist()}]
  monkeypatch.setattr(Study, "history", lambda self, name, run: history)
  text = study.held_out(RUNG.batch)
  found = moe_losses.trained(study, text, NONE, routers(Config())[NONE], None)
  assert json.loads(json.dumps(found)) == found
  assert [each["load"] for each in found] == [[[5, *layers.tolist()]] for layers in during]
  tokens = RUNG.batch * RUNG.length
  for each, load in zip(found, moe_losses.read(subjects[0], text)["load"][:, 0], strict=True):
    assert abs(each["nll"] - math.log(300)) < 0.5  # nothing was trained: the uniform guess
    counts = np.rint(load * CHOICES * tokens)
    room = math.ceil(1.25 * CHOICES * tokens / EXPERTS)
    assert counts.sum() == CHOICES * tokens
    assert each["max_load"] == pytest.approx(EXPERTS * counts.max() / counts.sum())
    over = np.maximum(counts - room, 0).sum() / counts.sum()
    assert each["dropped_share"] == pytest.approx(over) and over > 0
    shares = load[load > 0]
    assert each["load_entropy"] == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-5)


def test_the_load_of_all_layers_is_brought_together_in_their_order():
  stacked, single = np.arange(48.0).reshape(2, 3, EXPERTS), np.ones((2, EXPERTS))
  metrics = {"segments_1/ffn/router/load": single, "segments_0/ffn/router/load": stacked, "load": 1}
  found = moe_losses.by_layer(metrics)
  np.testing.assert_array_equal(found, np.concatenate([stacked, single[:, None]], axis=1))


def test_a_run_has_a_line_a_loss(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(moe_losses, "largest", lambda *_, **__: RUNG)
  by_hand = lambda study, text, name, router, after: [r for r in rows() if r["loss"] == name]
  monkeypatch.setattr(moe_losses, "trained", by_hand)
  monkeypatch.setattr(Study, "held_out", lambda *_: None)
  config = Config(losses="deepseek,none", text="embedded", seeds=3, rows=2)
  lines = moe_losses.run(config, str(tmp_path))
  assert [line["loss"] for line in lines] == [NONE, BALANCE]
  for name in ("config.json", "metrics.jsonl", "result.csv", "plot.png", "provenance.json"):
    assert (tmp_path / name).stat().st_size > 0
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
