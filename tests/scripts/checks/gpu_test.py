"""The check of a GPU without one: values interpreted, the arithmetic of its tables, refusals."""

import itertools
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import attend, masks
from effjax.kernels.flash_attention import cases
from scripts.checks import gpu, gpu_jobs, gpu_times, gpu_values


@pytest.mark.slow
def test_small_problems_interpreted():
  problems = gpu_values.problems(45, (32,))
  chosen = ("bfloat16-32", "bias")
  rows = [row for name in chosen for row in gpu_values.rows(name, problems[name], interpret=True)]
  assert [(row["problem"], row["by"]) for row in rows] == [
    (name, by) for name in chosen for by in ("xla", "gpu")
  ]
  assert all(row["good"] and set(row["errors"]) >= set(cases.NAMES[:5]) for row in rows)


def test_an_error_out_of_tolerance_fails_and_so_does_nan():
  problem = gpu_values.problems(45, (32,))["bfloat16-32"]
  for error, good in ((0.009, True), (0.011, False), (np.inf, False), (np.nan, False)):
    assert gpu_values._row("", "", problem, {"out": 0.0, "lse": error})["good"] == good


def test_causal_work_counts_the_pairs_that_are_seen(monkeypatch):
  monkeypatch.setattr(gpu_jobs, "TOKENS", 64)
  pairs = int(np.asarray(masks.Causal().dense(32)).sum())
  forward = gpu_jobs.work(32, causal=True, backward=False)
  assert forward == pytest.approx(4 * pairs * (64 // 32) * gpu_jobs.MODEL)
  assert gpu_jobs.work(32, causal=True, backward=True) == pytest.approx(3.5 * forward)


def test_tiles_left_out_are_those_of_the_map():
  mask = masks.SlidingWindow(100, 0)
  size = gpu_jobs.choose("gpu", jnp.bfloat16, 64, 1024, 1024).forward
  tiles = mask.dense(1024).reshape(1024 // size.queries, size.queries, 1024 // size.keys, size.keys)
  assert gpu_jobs.fewer(mask, 1024, 64) == pytest.approx(1 / tiles.any((1, 3)).mean())


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
@pytest.mark.parametrize("causal, backward", [(False, False), (True, True)])
def test_a_row_of_times_and_a_contender_that_does_not_compile(monkeypatch, causal, backward):
  monkeypatch.setattr(gpu_jobs, "TOKENS", 32)
  monkeypatch.setattr(gpu_jobs, "MODEL", 16)
  monkeypatch.setattr(gpu_times, "ENOUGH", 1e-4)
  xla = lambda *x, implementation, **options: attend(*x, implementation="xla", **options)
  monkeypatch.setattr(gpu_jobs, "attend", xla)
  job = gpu_jobs.Dense(8, 32, causal, backward)
  refused = lambda *arguments: attend(*arguments[:3], implementation="nobody's")
  ready = gpu_times.compiled(
    {by: (run, job.arguments()) for by, run in {**job.programs(), "none": refused}.items()}
  )
  failed, row = gpu_times.timed(job, ready, {"matmul TFLOP/s": 1.0})
  assert failed["error"].startswith("none: ValueError: implementation=")
  assert (row["width"], row["length"]) == (8, 32)
  assert (row["causal"], row["backward"]) == (causal, backward)
  assert row["TFLOP/s"] == pytest.approx(row["of matmul"]) and row["× cudnn"] > 0


def test_results_are_written_as_they_come_and_rows_of_other_jobs_stay(tmp_path):
  about = {"device": "NVIDIA H100 80GB", "jax": "1", "date": "2026-01-02"}
  value = {"problem": "bias", "by": "gpu", "errors": {"out": 0.25}, "largest": 0.25}
  jobs = ["values/bias", "dense/64"]
  results = gpu.Results(about, jobs, tmp_path)
  results.add("dense/64", [{"width": 64, "TFLOP/s": 12.25}, {"error": "cudnn: none"}])
  results = gpu.Results(about, jobs, tmp_path)
  results.add("dense/64", [{"error": "cudnn: gone"}, {"width": 64, "TFLOP/s": 512.25}])
  results.add("values/bias", [value])
  assert results.path.name == "gpu_nvidia-h100-80gb_2026-01-02.json"
  found = json.loads(results.path.read_text())
  assert found == {**about, "rows": results.rows} and list(found["rows"]) == jobs
  text = results.path.with_suffix(".md").read_text()
  assert "| bias | gpu | 0.25 |" in text and "| 64 | 512 |" in text
  assert "cudnn: gone" in text and "cudnn: none" not in text
