"""A small run of the experiment, and what its parts say of rows made by hand."""

import math

import numpy as np
import pytest

from effjax import cost
from effjax.models import presets
from experiments import harness
from experiments.attention import sparse_attention_lm
from experiments.attention.sparse_attention_lm import Config, claims, mixers, summarize, with_mixer
from experiments.lab.sizes import Rung
from experiments.lab.subject import Subject
from experiments.lab.verdicts import HELD, NOT_HELD, UNDECIDED

RUNG = Rung("tiny", 16, 1, 2, batch=2, learning_rate=1e-2, vocab=300, length=16)


def row(pattern, *perplexities, seed=0):
  nll = {f"nll {t}": math.log(p) for t, p in zip((1, 2, 4), perplexities, strict=True)}
  return {"pattern": pattern, "seed": seed, "flops_token": 1e6, **nll}


@pytest.mark.slow
def test_a_run_reads_the_same_tokens_in_every_context_and_resumes(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(sparse_attention_lm.budget, "largest", lambda *_, **__: RUNG)
  sizes = {"seeds": 2, "tokens_per_parameter": 0.01, "window": 4, "rows": 2}
  config = Config(patterns="window", text="embedded", **sizes)
  rows = sparse_attention_lm.run(config, str(tmp_path))
  assert [r["name"] for r in rows] == ["window seed=0", "window seed=1"]
  for r in rows:
    assert r["edges"] == [0, 2, 4, 8, 16, 32, 64]
    # Few steps leave a model that knows next to nothing: the uniform guess is log(vocabulary).
    assert all(abs(r[f"nll {t}"] - math.log(300)) < 0.5 for t in (1, 2, 4))
  # Beyond its window a causal window of one layer sees nothing, however long the context.
  assert rows[0]["nll 4"] == pytest.approx(rows[0]["nll 2"], abs=0.05)
  for name in ("config.json", "metrics.jsonl", "result.csv", "plot.png", "provenance.json"):
    assert (tmp_path / name).stat().st_size > 0
  assert sparse_attention_lm.run(config, str(tmp_path)) == rows
  assert "a window gets no worse than by 1 % at 4 times its length" in capsys.readouterr().out


def test_an_unknown_pattern_is_refused(tmp_path):
  with pytest.raises(ValueError, match="unknown pattern 'linformer'; allowed: all, full, window"):
    sparse_attention_lm.run(Config(patterns="linformer"), str(tmp_path))


def test_every_sparse_pattern_costs_fewer_flops_than_full_attention():
  dense = presets.llama(512, 64, 2, 4)
  flops = {
    name: cost.flops(with_mixer(dense, mixer, 512), length=512)
    for name, mixer in mixers(heads=4, window=16).items()
  }
  full = flops.pop("full")
  assert all(value < full for value in flops.values()), flops


def test_rows_are_cut_into_contexts_and_know_what_comes_before(monkeypatch):
  batch = {
    "positions": np.array([[0, 1, 2, 0, 1, 2, 3, 4]]),
    "weights": np.array([[1.0] * 7 + [0.0]]),
    "targets": np.arange(8)[None],
  }
  monkeypatch.setattr(sparse_attention_lm, "token_nll", lambda *x: x[-1]["targets"] / 2)
  nll, weight, before = sparse_attention_lm.read(
    Subject(presets.llama(8, 8, 1, 1), None), [batch], 4
  )
  assert nll.tolist() == [i / 2 for i in range(8)]
  assert weight.tolist() == batch["weights"][0].tolist()
  assert before.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]


def test_seeds_become_mean_and_spread():
  rows = [row("full", 10, 12, 14), row("full", 12, 12, 16, seed=1), row("window", 20, 19, 18)]
  full, window = summarize(rows)
  assert (full["1×"], full["± 1×"]) == pytest.approx((11, math.sqrt(2)))
  assert (window["4×"], window["± 4×"]) == (pytest.approx(18), None)
  assert harness.table([full], {"pattern": ""}).endswith("full")


def test_claims_are_judged_over_seeds():
  words = lambda rows: [verdict.word for verdict in claims(rows).values()]
  good = [row("full", 10, 12, 14), row("full", 12, 14, 16, seed=1)]
  good += [row("window", 20, 19, 18), row("window", 24, 23, 21.6, seed=1)]
  assert words(good) == [HELD, HELD, HELD]
  bad = [row("full", 10, 9, 8), row("full", 12, 11, 9.6, seed=1)]
  bad += [row("window", 5, 6, 7), row("window", 6, 7.2, 8.4, seed=1)]
  assert words(bad) == [NOT_HELD, NOT_HELD, NOT_HELD]
  assert set(words(good[::2])) == {UNDECIDED}
