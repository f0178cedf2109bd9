"""Splitting a tiny random model: which experts are on, what is looked at, what is claimed."""

import dataclasses

import jax
import numpy as np
import pytest

from effjax.moe import MoE
from effjax.train import perplexity
from experiments.lab.subject import load
from experiments.moe import splitting as study
from experiments.moe import ways

TINY = study.Config(
  model="tiny", text="stdlib", ways="gradient", experts=2, top_k=2, ks="2", calibration=4, rows=1,
  length=16, batch=1, steps=1, seeds=1, scale=1.5,
)  # fmt: skip


def test_a_run_says_what_parts_of_the_mlp_cost(tmp_path):
  dense, *split = study.run(TINY, str(tmp_path))
  assert [row["variant"] for row in split] == [study.RANDOM, "gradient"]
  for row in split:
    assert row["logits off"] <= study.SAME and row["parameters"] > dense["parameters"]
    assert row["before k=2"] == pytest.approx(perplexity(row["before"]))
    assert row["after k=2"] == pytest.approx(perplexity(row["after"]))
  assert {"plot.png", "result.csv", "provenance.json"} <= {x.name for x in tmp_path.iterdir()}


def test_what_is_shared_is_one_of_the_experts():
  subject, _ = load("tiny")
  variants = ways.variants(FakeStatistics(subject), experts=4, top_k=2)
  split = variants[ways.RESIDUAL](subject, jax.random.key(0))
  ffn = split.config.layers[0].ffn
  whole = subject.config.layers[0].ffn.width
  assert isinstance(ffn, MoE) and ffn.shared.width == ffn.expert.width == whole // 4
  assert (ffn.router.experts, ffn.router.top_k) == (3, 1)
  assert ways.with_k(split, 4).config.layers[0].ffn.router.top_k == 3


class FakeStatistics:
  """Importance to four groups, of every unit of every layer."""

  def __init__(self, subject):
    count, width = len(subject.config.layers), subject.config.layers[0].ffn.width
    rng = np.random.default_rng(0)
    draw = lambda: {"segments_0/layers_0/ffn/down": rng.random((count, width))}
    self.importance = [draw() for _ in range(4)]


def test_bad_input_is_named(tmp_path):
  for message, change in {
    "unknown way 'best'": {"ways": "best"},
    "top_k=3; allowed: 2 … experts=2": {"top_k": 3},
    "calibration=5; allowed: multiples of experts=2": {"calibration": 5},
    "steps=0; allowed: from 1": {"steps": 0},
  }.items():
    with pytest.raises(ValueError, match=message):
      study.run(dataclasses.replace(TINY, **change), str(tmp_path))
