"""The check of a GPU without one: values interpreted, the arithmetic of its tables, refusals."""

import itertools
import json
import types

import numpy as np
import pytest

from effjax.attention import attend, masks
from effjax.kernels.flash_attention import cases
from scripts.checks import gpu, gpu_times, gpu_values


@pytest.mark.slow
def test_small_problems_interpreted():
  problems = gpu_values.problems(45, (32,))
  chosen = {name: problems[name] for name in ("bfloat16-32", "bias")}
  rows = list(gpu_values.rows(chosen, interpret=True))
  assert [row["by"] for row in rows] == ["gpu", "xla"] * 2
  assert all(row["good"] and set(row["errors"]) >= set(cases.NAMES[:5]) for row in rows)


def test_an_error_out_of_tolerance_fails_and_so_does_nan():
  problem = gpu_values.problems(45, (32,))["bfloat16-32"]
  for error, good in ((0.009, True), (0.011, False), (np.inf, False), (np.nan, False)):
    assert gpu_values._row("", "", problem, {"out": 0.0, "lse": error})["good"] == good


def test_causal_work_counts_the_pairs_that_are_seen(monkeypatch):
  monkeypatch.setattr(gpu_times, "TOKENS", 64)
  pairs = int(np.asarray(masks.Causal().dense(32)).sum())
  forward = gpu_times.work(32, causal=True, backward=False)
  assert forward == pytest.approx(4 * pairs * (64 // 32) * gpu_times.MODEL)
  assert gpu_times.work(32, causal=True, backward=True) == pytest.approx(3.5 * forward)


def test_tiles_left_out_are_those_of_the_map():
  mask = masks.SlidingWindow(100, 0)
  status = mask.blocks(1024, 1024, 128, 128).dense()
  assert gpu_times.fewer(mask, 1024, 64) == pytest.approx(status.size / (status > 0).sum())


def test_a_median_is_the_time_of_one_call(monkeypatch):
  now, turns = [0.0], {"steady": [], "uneven": []}

  def contender(name, seconds):
    turn = turns[name]

    def call():
      now[0] += next(seconds)
      turn.append("called")

    return call, lambda _: turn.append("waited")

  monkeypatch.setattr(gpu_times, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
  monkeypatch.setattr(gpu_times, "ENOUGH", 0.5)
  uneven = itertools.chain([0.25] * 6, [9.0] * 2, itertools.repeat(0.25))
  times = gpu_times.medians(
    {
      "steady": contender("steady", itertools.repeat(0.0625)),
      "uneven": contender("uneven", uneven),
    },
    rounds=3,
  )
  assert times == {"steady": 0.0625, "uneven": 0.25}
  assert [turn.count("waited") for turn in turns.values()] == [5, 5]
  assert [turn.count("called") for turn in turns.values()] == [2 * 3 + 3 * 8, 2 * 3 + 3 * 2]


@pytest.mark.slow
def test_rows_of_times(monkeypatch):
  monkeypatch.setattr(gpu_times, "TOKENS", 32)
  monkeypatch.setattr(gpu_times, "MODEL", 16)
  monkeypatch.setattr(gpu_times, "ENOUGH", 1e-4)
  xla = lambda *x, implementation, **options: attend(*x, implementation="xla", **options)
  monkeypatch.setattr(gpu_times, "attend", xla)
  rows = list(gpu_times.dense([32], (8,), peak=1e12))
  assert [(row["causal"], row["backward"]) for row in rows] == [
    (causal, backward) for causal in (False, True) for backward in (False, True)
  ]
  for row in rows:
    assert row["TFLOP/s"] == pytest.approx(row["of matmul"]) and row["× cudnn"] > 0


def test_results_are_written_as_json_and_as_tables(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  value = {"problem": "bias", "by": "gpu", "errors": {"out": 0.25}, "largest": 0.25}
  result = {"device": "NVIDIA H100 80GB", "jax": "1", "date": "2026-01-02", "values": [value]}
  result |= {"dense": [{"width": 64, "TFLOP/s": 512.25}], "sparse": [], "matmul TFLOP/s": 700.0}
  path = gpu.write(result)
  assert path.name == "gpu_nvidia-h100-80gb_2026-01-02.json"
  assert json.loads(path.read_text()) == result
  text = path.with_suffix(".md").read_text()
  assert "| bias | gpu | 0.25 |" in text and "| 64 | 512 |" in text
