"""A small run of the experiment, what its rows are, and what is said of rows made by hand."""

import math

import numpy as np
import pytest

from effjax import cost
from effjax.models import presets
from experiments.lab.sizes import Rung, parameters
from experiments.lab.verdicts import HELD, NOT_HELD, UNDECIDED
from experiments.moe import hash_layers
from experiments.moe.hash_layers import DENSE, MULTI, NAMES, PUBLISHED, Config, with_hashes

RUNG = Rung("tiny", 16, 2, 2, batch=2, learning_rate=1e-2, vocab=300, length=16)
SIZES = {"seeds": 2, "tokens_per_parameter": 0.01, "experts": 4, "held_out": 2}


def rows(values):
  """A row of each name and seed that pays so many nats."""
  return [
    {"row": name, "seed": seed, "nll": nll + 3e-4 * seed * (len(name) % 3), "parameters": 1e6}
    for name, nll in values.items()
    for seed in range(3)
  ]


@pytest.mark.slow
def test_a_run_measures_what_a_model_is_told_and_resumes(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(hash_layers.budget, "largest", lambda *_, **__: RUNG)
  config = Config(rows="predicted", text="embedded", **SIZES)
  found = hash_layers.run(config, str(tmp_path))
  assert [row["name"] for row in found] == ["predicted seed=0", "predicted seed=1"]
  for row in found:
    # Few steps leave a model that knows next to nothing: the uniform guess is log(vocabulary).
    assert abs(row["nll"] - math.log(300)) < 0.5
    assert 1 <= row["max_load"] <= 4 and 0 <= row["entropy"] <= 1
  assert sorted(path.name for path in (tmp_path / "trainings").iterdir()) == ["dense", "predicted"]
  for name in ("config.json", "metrics.jsonl", "result.csv", "plot.png", "provenance.json"):
    assert (tmp_path / name).stat().st_size > 0
  assert hash_layers.run(config, str(tmp_path)) == found
  assert "25.02" in capsys.readouterr().out


def test_an_unknown_row_is_refused(tmp_path):
  with pytest.raises(ValueError, match="unknown row 'learned'; allowed: all, dense, balanced"):
    hash_layers.run(Config(rows="learned"), str(tmp_path))


def test_every_row_costs_what_the_dense_model_does_and_has_the_parameters_of_the_others():
  dense = presets.llama(64, 48, 4, 3, context=16)
  hashed = [with_hashes(dense, name, 8) for name in NAMES.values() if name != DENSE]
  assert {cost.flops(config, 16) for config in hashed} == {cost.flops(dense, 16)}
  counts = {parameters(config) for config in hashed}
  mlp = 3 * 48 * dense.layers[0].ffn.width
  assert counts == {parameters(dense) + 7 * mlp, parameters(dense) + 4 * mlp}


class Study:
  """What `Hashes` asks of a study to build its tables."""

  rung, seeds, dense = RUNG, [0, 1], presets.llama(300, 16, 2, 2, context=16)

  def loaders(self, order):
    texts = {seed: np.random.default_rng(seed).zipf(1.3, 10**5) % 300 for seed in self.seeds}
    return {seed: iter({"tokens": x.reshape(10, 10)} for x in text.reshape(-1, 100))
            for seed, text in texts.items()}  # fmt: skip


def test_tables_are_of_the_experts_of_each_row(monkeypatch):
  hashes = hash_layers.Hashes(Study(), experts=8)
  embedding = np.random.default_rng(0).normal(size=(2, 300, 16)).astype(np.float32)
  dense = hash_layers.Subject(Study.dense, {"embed": {"embedding": embedding}})
  monkeypatch.setattr(hashes, "trained", {DENSE: dense}.get)
  entries = {"position": 16, "bigram": hash_layers.BUCKETS}
  for name in [name for name in (*PUBLISHED, MULTI) if name != DENSE]:
    table, other = hashes.tables(name, 0), hashes.tables(name, 1)
    several = table if isinstance(table, list) else [table]
    assert len(several) == (2 if name == "layers, different" else 1)
    assert all(len(each) == entries.get(name, 300) for each in several)
    assert {each.max() + 1 for each in several} == {4 if name.startswith("layers") else 8}
    same = name in ("position", "balanced", "previous", "predicted", "oracle", "layers, same")
    assert np.array_equal(np.asarray(table), np.asarray(other)) == same
  first, second = hashes.tables("layers, different", 0)
  assert (first != second).any()
  assert hashes.tables(MULTI, 0).shape == (300, hash_layers.SEGMENTS)


def test_evenness_is_that_of_the_layers():
  found = hash_layers.evenness(np.array([[0.5, 0.5, 0, 0], [0.25] * 4]))
  assert found == {"max_load": 1.5, "entropy": pytest.approx(0.75)}


def test_the_published_order_is_judged_by_neighbours_over_seeds():
  words = lambda values: [verdict.word for verdict in hash_layers.claims(rows(values)).values()]
  published = {name: math.log(x) for name, x in PUBLISHED.items()}
  found = hash_layers.claims(rows(published))
  assert {verdict.word for verdict in found.values()} == {HELD}
  assert "dense predicts better than predicted" in found
  upside_down = {name: -4 * x for name, x in published.items()}
  assert set(words(upside_down)) == {NOT_HELD, HELD}
  close = {"balanced": 3.0, "random": 3.0149}
  assert words(close) == [UNDECIDED]


def test_places_and_differences_are_of_the_rows_that_were_measured():
  found = {line["row"]: line for line in hash_layers.summarize(rows({DENSE: 3.0, "random": 2.9}))}
  assert (found[DENSE]["place"], found["random"]["place"]) == (2, 1)
  assert (found[DENSE]["its place"], found["random"]["its place"]) == (2, 1)
  assert found["random"]["− dense, nats"] == pytest.approx(-0.1006)
  assert "− dense, nats" not in found[DENSE] and "max_load" not in found[DENSE]
