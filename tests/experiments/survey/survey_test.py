"""The survey on a tiny model: rows, resumption, selection, and what its parts compute."""

import math

import jax
import pytest

from effjax.core import trees
from effjax.train import workdir
from experiments.lab.short_runs import Lab, Run, Shape
from experiments.lab.subject import costs, ratio
from experiments.survey import survey, techniques

SMOKE = survey.Config(
  model="tiny",
  rows=1,
  length=64,
  decode=2,
  seeds=2,
  steps=3,
  width=32,
  layers=2,
  vocab=300,
  batch=2,
  short_length=32,
  short_rows=2,
)


def smoke(**changes) -> survey.Config:
  return survey.Config(**{**vars(SMOKE), **changes})


@pytest.fixture(scope="module")
def lab():
  shape = Shape(32, 2, 2, vocab=300, length=32, batch=2, steps=6, text="embedded")
  return Lab(shape)


@pytest.fixture(scope="module")
def subject(lab):
  return lab.fresh(lab.dense, 0)


@pytest.mark.slow
def test_a_selection_runs_resumes_and_grows(tmp_path, capsys):
  rows = survey.run(smoke(techniques="lora-r8"), str(tmp_path))
  assert [row["technique"] for row in rows] == ["dense", "lora-r8"]
  assert abs(rows[1]["change"]) < 1e-5
  before = (tmp_path / "metrics.jsonl").read_text()
  rows = survey.run(smoke(techniques="lora-r8,trained-window-16"), str(tmp_path))
  assert (tmp_path / "metrics.jsonl").read_text().startswith(before)
  names = ["dense", "lora-r8", "trained-dense", "trained-window-16"]
  assert [row["technique"] for row in rows] == names
  assert rows[3]["seeds"] == 2
  assert rows[3]["spread"] > 0
  for name in ("config.json", "result.csv", "plot.png"):
    assert (tmp_path / name).stat().st_size > 0
  assert "trained-window-16" in capsys.readouterr().out


@pytest.mark.slow
def test_every_technique_runs(tmp_path):
  rows = survey.run(smoke(seeds=1), str(tmp_path))
  assert [row["technique"] for row in rows] == [t.name for t in techniques.TECHNIQUES]
  assert len(rows) >= 9
  assert all(math.isfinite(row["perplexity"]) and row["decode_ratio"] > 0 for row in rows)
  for technique in techniques.TECHNIQUES:
    row = next(row for row in rows if row["technique"] == technique.name)
    assert not technique.same_function or abs(row["change"]) < 1e-4
  training = [row for row in workdir.read_rows(tmp_path / "metrics.jsonl") if "seed" in row]
  assert all({"step", "loss"} <= set(row) for row in training)


def test_an_unknown_technique_is_refused_with_the_names(tmp_path):
  with pytest.raises(ValueError, match=r"unknown technique 'qlora'; allowed: all, dense, bf16"):
    survey.run(smoke(techniques="qlora"), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_configuration_is_refused(tmp_path):
  workdir.claim(tmp_path, smoke(techniques="int8"), free=("techniques",))
  with pytest.raises(ValueError, match="length is 64 there and 32 here"):
    survey.run(smoke(length=32), str(tmp_path))


def test_an_unknown_model_is_refused(tmp_path):
  with pytest.raises((ValueError, FileNotFoundError), match="nonesuch"):
    survey.run(smoke(model="nonesuch", techniques="int8"), str(tmp_path))


def test_names_are_unique_and_baselines_are_there():
  names = [technique.name for technique in techniques.TECHNIQUES]
  assert len(set(names)) == len(names)
  assert {techniques.BASELINE, techniques.TRAINED_BASELINE} <= set(names)


def test_costs_of_known_cases(lab, subject, key):
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


@pytest.mark.parametrize("passes", [2.0, 3.0])
def test_steps_spend_the_budget(lab, subject, passes):
  assert lab.steps(Run(subject)) == 6
  assert lab.steps(Run(subject, spent=0.5)) == 3
  assert lab.steps(Run(subject, passes=passes)) == round(6 * 3 / passes)


@pytest.mark.slow
def test_only_the_factors_of_lora_move(lab, subject, key):
  start = techniques.with_lora(4)(subject, key)
  trained, curve = lab.train(Run(start, spent=0.5), 0, "lora")
  assert curve[-1][0] == 3
  before, after = (jax.tree_util.tree_leaves_with_path(s.params) for s in (start, trained))
  moved = [
    trees.path_string(path)
    for (path, x), (_, y) in zip(before, after, strict=True)
    if not bool((x == y).all())
  ]
  assert moved
  assert all(path.endswith(("/a", "/b")) for path in moved)


def test_summaries_are_means_over_seeds_and_changes_to_their_own_baseline():
  times = dict.fromkeys(("prefill_ms", "decode_ms", "prefill_ratio", "decode_ratio"), 1.0)
  row = lambda name, model, perplexity, kind="mask": {
    "technique": name, "model": model, "kind": kind, "nll": math.log(perplexity), **times
  }  # fmt: skip
  rows = survey.summarize(
    [
      row("dense", "big", 10.0, "baseline"),
      row("int8", "big", 11.0),
      row("trained-dense", "small", 100.0, "baseline"),
      row("trained-half-depth", "small", 90.0, "baseline"),
      row("moe", "small", 80.0),
      row("moe", "small", 100.0),
    ]
  )
  by_name = {row["technique"]: row for row in rows}
  assert by_name["int8"]["change"] == pytest.approx(0.1)
  assert by_name["moe"]["perplexity"] == pytest.approx(90.0)
  assert by_name["moe"]["spread"] == pytest.approx(math.sqrt(200))
  assert by_name["moe"]["change"] == pytest.approx(-0.1)
  assert by_name["trained-half-depth"]["change"] == pytest.approx(-0.1)


def test_claims_judge_only_rows_that_are_there():
  same = {"technique": "lora-r8", "change": 0.0}
  rows = [{"technique": "dense", "change": 0.0, "bytes": 100}, same]
  assert list(survey.claims(rows).values()) == [True]
  assert list(survey.claims([rows[0], {**same, "change": 0.01}]).values()) == [False]
  int8 = {"technique": "int8", "change": 0.01, "bytes": 40}
  assert list(survey.claims([rows[0], int8]).values()) == [False]


def test_the_median_of_ratios_is_not_the_ratio_of_medians():
  assert ratio([1.0, 10.0, 3.0], [1.0, 1.0, 1.5]) == 2.0
