"""The survey on tiny models: rows, resumption, selection, and what its parts compute."""

import json
import math

import jax
import pytest

from effjax import cost
from effjax.core import trees
from effjax.train import workdir
from experiments import harness
from experiments.lab.sizes import Rung
from experiments.lab.speed import ratio
from experiments.lab.study import Study
from experiments.lab.subject import costs
from experiments.survey import survey, table, techniques

RUNG = Rung("tiny", 32, 2, 2, batch=2, learning_rate=1e-2, vocab=300, length=32)
SMOKE = {"model": "tiny", "rows": 1, "length": 64, "decode": 2, "seeds": 2, "trained_rows": 4}
SMOKE |= {"tokens_per_parameter": 0.008, "text": "embedded"}
# Mixtures train in the tests of their own experiments; here they are made.
MIXTURES = ("trained-moe-8x2", "trained-switch-4x1", "trained-hash-4x1", "trained-fine-15x3+1")
RUN = [t for t in techniques.TECHNIQUES if t.name not in MIXTURES]


def smoke(**changes) -> survey.Config:
  return survey.Config(**{**SMOKE, **changes})


@pytest.fixture
def small(monkeypatch):
  """Trained rows of a model that compiles at once."""
  monkeypatch.setattr(survey.budget, "largest", lambda *_, **__: RUNG)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
  corpus = survey.data.text("embedded")
  folder = tmp_path_factory.mktemp("study")
  return Study(RUNG, corpus, tokens_per_parameter=0.008, seeds=(0, 1), folder=folder)


@pytest.fixture(scope="module")
def subject(study):
  return study.fresh(study.dense).at(0)


@pytest.mark.slow
def test_a_selection_runs_and_grows(tmp_path, capsys, small):
  rows = survey.run(smoke(techniques="lora-r8"), str(tmp_path))
  assert [row["technique"] for row in rows] == ["dense", "lora-r8"]
  assert abs(rows[1]["change %"]) < 1e-3
  before = (tmp_path / "metrics.jsonl").read_text()
  rows = survey.run(smoke(techniques=",".join(t.name for t in RUN)), str(tmp_path))
  assert (tmp_path / "metrics.jsonl").read_text().startswith(before)
  assert [row["technique"] for row in rows] == [t.name for t in RUN]
  window = next(row for row in rows if row["technique"] == "trained-window-16")
  assert window["± seeds"] > 0 and window["± 95 %"] > 0
  for name in ("config.json", "result.csv", "plot.png", "table.md"):
    assert (tmp_path / name).stat().st_size > 0
  printed = capsys.readouterr().out
  assert "1/2500 of the 20 that a verdict wants" in printed
  assert "at equal FLOPs, trained-dense predicts better than trained-window-16 (" in printed
  source = json.loads((tmp_path / "provenance.json").read_text())
  assert source["text_sha256"] == survey.data.text("embedded").fingerprint
  assert {"python", "jax", "effjax", "commit", "processor"} <= source.keys()
  for technique, row in zip(RUN, rows, strict=True):
    assert row["decode ×"] > 0
    if technique.trained:
      # So little training leaves the uniform guess over the vocabulary.
      assert abs(row["nats/token"] - math.log(300)) < 1.0
    assert not technique.same_function or abs(row["change %"]) < 0.01
  measured = workdir.read_rows(tmp_path / "metrics.jsonl")
  assert {row["seed"] for row in measured if "seed" in row} == {0, 1}
  dense, half = (
    next(row for row in measured if row["technique"] == name)
    for name in (techniques.TRAINED_BASELINE, techniques.HALF)
  )
  apart = half["flops_token"] * half["tokens"] - dense["flops_token"] * dense["tokens"]
  step = RUNG.batch * RUNG.length * (half["flops_token"] + dense["flops_token"])
  assert abs(apart) <= step / 2  # both are rounded to whole steps


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_use_as_much_as_the_dense_model(name, study):
  made = techniques.NAMED[name].make(study).subject
  dense = cost.flops(study.dense, RUNG.length)
  assert cost.flops(made.config, RUNG.length) == pytest.approx(dense, rel=0.1)
  assert cost.parameters(made.at(0).params) > 1.5 * cost.parameters(
    study.fresh(study.dense).at(0).params
  )


@pytest.mark.parametrize(
  ("text", "names"),
  [
    ("int8", ["dense", "int8"]),
    ("trained-distilled", ["trained-dense", "trained-half-depth", "trained-distilled"]),
    ("trained", [t.name for t in techniques.TECHNIQUES if t.trained]),
    ("pretrained", [t.name for t in techniques.TECHNIQUES if not t.trained]),
    ("all", [t.name for t in techniques.TECHNIQUES]),
  ],
)
def test_a_choice_brings_what_it_stands_against(text, names):
  assert [technique.name for technique in survey.choose(text)] == names


def test_an_unknown_technique_is_refused_with_the_names(tmp_path):
  with pytest.raises(
    ValueError, match=r"unknown technique 'qlora'; allowed: all, pretrained, trained, dense"
  ):
    survey.run(smoke(techniques="qlora"), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_configuration_is_refused(tmp_path):
  workdir.claim(tmp_path, smoke(techniques="int8"), free=("techniques",))
  with pytest.raises(ValueError, match="length is 64 there and 32 here"):
    survey.run(smoke(length=32), str(tmp_path))


def test_an_unknown_model_is_refused(tmp_path):
  with pytest.raises((ValueError, FileNotFoundError), match="nonesuch"):
    survey.run(smoke(model="nonesuch", techniques="int8"), str(tmp_path))


def test_names_are_unique_and_every_row_stands_against_one_that_is_there():
  assert len(techniques.NAMED) == len(techniques.TECHNIQUES)
  assert techniques.BASELINE in techniques.NAMED
  for technique in techniques.TECHNIQUES:
    assert technique.against is None or techniques.NAMED[technique.against].trained


def test_costs_of_known_cases(subject, key):
  dense = costs(subject, 32)
  assert dense["parameters"] == dense["active"] == dense["trainable"]
  assert dense["bytes"] == 4 * dense["parameters"]
  halved = costs(techniques.bf16(subject, key), 32)
  assert halved["bytes"] * 2 == dense["bytes"]
  adapted = costs(techniques.with_lora(4)(subject, key), 32)
  assert adapted["parameters"] - dense["parameters"] == adapted["trainable"]
  assert adapted["flops_token"] - dense["flops_token"] == 2 * adapted["trainable"]
  sparse = costs(techniques.upcycled(4)(subject, key), 32)
  mlp = trees.count({k: v for k, v in trees.items(subject.params).items() if "/ffn/" in k})
  assert sparse["active"] - dense["parameters"] == mlp + 2 * 32 * 4  # one copy more, two routers
  assert sparse["parameters"] - dense["parameters"] == 3 * mlp + 2 * 32 * 4
  windowed = costs(techniques.masked(techniques.masks.SlidingWindow(3, 0))(subject, key), 32)
  assert windowed["flops_token"] < dense["flops_token"]


@pytest.mark.slow
def test_alternating_masks_keep_each_layers_parameters(subject, key):
  mask = techniques.masks.SlidingWindow(63, 0)
  alternating = techniques.masked(mask, every=2)(subject, key)
  specs = alternating.config.layers
  assert [spec.mixer.mask == mask for spec in specs] == [True, False]
  tokens = jax.numpy.arange(8)[None]
  same = [s.module.apply({"params": s.params}, tokens) for s in (subject, alternating)]
  assert float(abs(same[0] - same[1]).max()) < 1e-5


@pytest.mark.slow
def test_only_the_factors_of_lora_move(study):
  run = techniques.run_lora(study)
  trained = study.trained("lora", run)
  before, after = (jax.tree_util.tree_leaves_with_path(s.params) for s in (run.subject, trained))
  moved = [
    trees.path_string(path)
    for (path, x), (_, y) in zip(before, after, strict=True)
    if not bool((x == y).all())
  ]
  assert moved
  assert all(path.endswith(("/a", "/b")) for path in moved)


def test_factors_of_lora_count_in_what_a_step_costs(study, monkeypatch):
  monkeypatch.setattr(study, "dense_after", lambda part: study.fresh(study.dense))
  run = techniques.run_lora(study)
  factors = cost.trainable(run.subject.at(0).params)
  assert run.spending.extra_flops == 3 * 2 * factors
  assert run.spending.passes == 2.0


def row(name, nll, seed=None, **others):
  sizes = ("parameters", "active", "trainable", "bytes", "flops_token")
  times = ("prefill_ratio", "decode_ratio")
  kind = {"technique": name, "kind": techniques.NAMED[name].kind, "nll": nll, "bits_byte": nll}
  found = dict.fromkeys((*sizes, *times), 1.0) | kind | others
  if seed is None:
    return found
  return found | {"seed": seed, "tokens": 100, "against": techniques.NAMED[name].against}


def test_lines_are_means_over_seeds_and_differences_paired_by_seed():
  measured = [row("dense", math.log(10.0)), row("int8", math.log(11.0))]
  measured += [row("trained-dense", nll, seed) for seed, nll in enumerate((3.0, 3.2, 3.4))]
  measured += [row("trained-moe-8x2", nll, seed) for seed, nll in enumerate((2.9, 3.1, 3.3))]
  first, second = table.pretrained(measured), table.trained(measured)
  assert first[1]["change %"] == pytest.approx(10.0)
  dense, sparse = second
  assert dense["nats/token"] == pytest.approx(3.2)
  assert dense["± seeds"] == pytest.approx(0.2)
  assert "Δ nats" not in dense
  assert sparse["Δ nats"] == pytest.approx(-0.1)
  assert sparse["± 95 %"] == pytest.approx(0.0, abs=1e-9)
  claims = {claim: str(verdict) for claim, verdict in table.claims(measured).items()}
  said = claims["at equal FLOPs, trained-moe-8x2 predicts better than trained-dense"]
  assert said.startswith("held (-0.1000")


def test_one_seed_is_undecided():
  measured = [row("trained-dense", 3.0, 0), row("trained-window-16", 3.5, 0)]
  (verdict,) = table.claims(measured).values()
  assert verdict.word == "undecided"
  assert table.trained(measured)[1]["± 95 %"] is None


def test_claims_judge_only_rows_that_are_there():
  same = {"bytes": 100}
  rows = [row("dense", 1.0, **same), row("lora-r8", 1.0, **same)]
  assert list(table.claims(rows).values()) == [True]
  assert list(table.claims([rows[0], row("lora-r8", 1.01, **same)]).values()) == [False]
  assert list(table.claims([rows[0], row("int8", 1.01, bytes=40)]).values()) == [False]
  assert list(table.claims([rows[0], row("int8", 1.01, bytes=26)]).values()) == [True]


def test_the_file_of_tables_has_lines_verdicts_and_where_it_comes_from():
  measured = [row("trained-dense", 3.0, 0), row("trained-window-16", 3.5, 0)]
  tables = table.tables(measured, "As it is", "Trained")
  source = survey.provenance.provenance(survey.data.text("pydoc"))
  text = survey.markdown(tables, table.claims(measured), source)
  assert text.startswith("Trained:\n\n| technique | nats/token |")
  assert harness.markdown(*tables[0][1:]) in text
  assert "* undecided:    at equal FLOPs, trained-dense predicts better" in text
  assert source["text_sha256"][:16] in text


def test_the_median_of_ratios_is_not_the_ratio_of_medians():
  assert ratio([1.0, 10.0, 3.0], [1.0, 1.0, 1.5]) == 2.0
