"""Outlier features on a tiny random model: who is counted, what is planted, what is claimed."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import linear, trees
from effjax.data import text
from effjax.layers import capture, reductions
from experiments import harness
from experiments.lab.subject import load
from experiments.quant import outliers as study
from experiments.quant.schemes import BASELINE
from tests.modules import apply, normal

TINY = study.Config(
  model="tiny", text="stdlib", rows=2, length=32, thresholds="0,6", factors="64", channels=2
)
TOKENS = np.arange(64).reshape(2, 32) % 250


def test_a_run_says_where_they_are_and_what_they_cost(tmp_path):
  rows = {row["name"]: row for row in study.run(TINY, str(tmp_path))}
  layers = len(load("tiny")[0].config.layers)
  assert [len(rows[words]["largest"]) for words in study.PLACES.values()] == [layers] * 4
  exact, none, few = (rows[name] for name in (BASELINE, "threshold=0", "threshold=6"))
  assert exact["ratio"] == 1 and exact["share"] is None
  assert 0 == none["share"] < few["share"] == rows[study.EXACT]["share"] < 0.01
  assert rows[f"planted ×64: {BASELINE}"]["nll"] == exact["nll"]
  integers, apart = (rows[f"planted ×64: {s}"] for s in (study.INTEGERS, study.EXACT))
  assert apart["share"] > few["share"] and integers["share"] is None
  assert {"metrics.jsonl", "plot.png", "result.csv"} <= {path.name for path in tmp_path.iterdir()}


def test_largest_inputs_and_shares_are_those_of_the_calls():
  corpus = text("stdlib")
  found = study.Study(TINY, corpus, [0.0, 1.0, study.PUBLISHED])
  subject, batches = found._loaded[0], found._text.batches
  values = capture(
    subject.module, subject.params, batches, reduce=reductions.keep, select="mixer/query|ffn/down"
  )
  rows = [found.place(place) for place in ("query", "down")]
  for row, (path, x) in zip(rows, sorted(values.items(), reverse=True), strict=True):
    size = np.abs(np.asarray(x))  # [layers, rows, tokens, features]
    np.testing.assert_allclose(row["largest"], size.max((1, 2, 3)), rtol=1e-6)
    assert row["features"] == (size.max((1, 2)) >= study.PUBLISHED).sum(-1).tolist()
    share = (size.max(2) >= 1.0).mean((1, 2))
    name = path.rsplit("/", 1)[-1]
    ours = [layer[name][1][1] for layer in found._inputs(1.0)]
    np.testing.assert_allclose(ours, share, rtol=1e-6)


def test_planted_outliers_change_inputs_and_no_number_of_the_model():
  subject, _ = load("tiny")
  changed = study.planted(subject, 64.0, 2)
  before, after = (apply(each.module, each.params, TOKENS) for each in (subject, changed))
  np.testing.assert_array_equal(before, after)
  peaks = [
    capture(each.module, each.params, {"tokens": TOKENS}, reduce=reductions.absmax)
    for each in (subject, changed)
  ]
  for path, peak in peaks[0].items():
    grown = np.asarray(peaks[1][path] / peak)
    norms = path.rsplit("/", 1)[-1] in ("query", "key", "value", "gate", "up")
    wanted = np.isin(np.arange(peak.shape[-1]), (0, peak.shape[-1] // 2)) & norms
    np.testing.assert_array_equal(grown == 64, np.broadcast_to(wanted, grown.shape))
  assert trees.count(changed.params) == trees.count(subject.params)


def test_planted_outliers_spoil_what_rounds_them_with_the_others():
  x, w = (np.asarray(normal(64, 64, seed=seed)) for seed in (0, 1))
  grow = np.where(np.arange(64) < 2, np.float32(64), np.float32(1))
  params = {"query": {"kernel": jnp.asarray(w / grow[:, None])}}

  def off(scheme):
    made = study.SCHEMES[scheme](params, study.PUBLISHED)["query"]["kernel"]
    return np.square(np.asarray(linear(jnp.asarray(x * grow), made)) - x.astype(float) @ w).mean()

  exact, apart, none = map(off, (study.EXACT, study.APART, study.INTEGERS))
  assert off(BASELINE) < 1e-6 < exact < apart / 10 and exact < none / 100


def test_claims_are_about_what_was_read():
  def row(scheme, factor, threshold, ratio):
    return {"scheme": scheme, "factor": factor, "threshold": threshold, "ratio": ratio}

  plain = [row(study.APART, 1.0, 0.0, 1.02), row(study.APART, 1.0, 6.0, 1.002)]
  assert list(study.claims(plain).values()) == [True, True]
  assert study.claims(plain[:1]) == {}
  behind = [
    row(BASELINE, 8.0, 6.0, 1.0),
    row(study.INTEGERS, 8.0, 6.0, 1.5),
    row(study.APART, 8.0, 6.0, 1.2),
    row(study.EXACT, 8.0, 6.0, 1.3),
  ]
  assert list(study.claims(plain + behind).values()) == [True, True, True, True, True, False]


def test_bad_input_is_named(tmp_path):
  for message, change in {
    "thresholds='-1'; allowed: numbers from 0": {"thresholds": "-1"},
    "thresholds='six'; allowed": {"thresholds": "six"},
    "factors='0.5'; allowed: numbers from 1": {"factors": "0.5"},
    "factors='nan'; allowed": {"factors": "nan"},
    "channels=65; allowed: 0 … 64": {"channels": 65, "text": "stdlib"},
  }.items():
    with pytest.raises(ValueError, match=message):
      study.run(dataclasses.replace(TINY, **change), str(tmp_path))
  assert not harness.files.read_rows(tmp_path / harness.files.METRICS)
  subject, _ = load("tiny")
  post = dataclasses.replace(
    subject, config=dataclasses.replace(subject.config, arrangement="post")
  )
  with pytest.raises(ValueError, match="arrangement='post' of the model; allowed: norms before"):
    study.planted(post, 2.0, 1)
