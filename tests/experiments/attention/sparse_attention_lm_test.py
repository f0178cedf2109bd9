"""A small run of the experiment, and what its parts say of rows made by hand."""

import math

import numpy as np
import pytest

from effjax import cost
from effjax.models import presets
from experiments import harness
from experiments.attention import sparse_attention_lm
from experiments.attention.sparse_attention_lm import Config, claims, mixers, summarize, with_mixer
from experiments.lab.subject import Subject

SMOKE = {"seeds": 2, "steps": 2, "batch": 2, "length": 16, "window": 4, "rows": 2}
SMOKE |= {"width": 16, "layers": 1, "heads": 2, "vocab": 300}


def row(pattern, *perplexities, seed=0):
  nll = {f"nll {t}": math.log(p) for t, p in zip((1, 2, 4), perplexities, strict=True)}
  return {"pattern": pattern, "seed": seed, "flops_token": 1e6, **nll}


@pytest.mark.slow
def test_a_run_reads_the_same_tokens_in_every_context_and_resumes(tmp_path, capsys):
  config = Config(patterns="window", **SMOKE)
  rows = sparse_attention_lm.run(config, str(tmp_path))
  assert [r["name"] for r in rows] == ["window seed 0", "window seed 1"]
  for r in rows:
    assert r["edges"] == [0, 2, 4, 8, 16, 32, 64]
    # Two steps leave a model that knows next to nothing: the uniform guess is log(vocabulary).
    assert all(abs(r[f"nll {t}"] - math.log(300)) < 0.5 for t in (1, 2, 4))
  # Beyond its window a causal window of one layer sees nothing, however long the context.
  assert rows[0]["nll 4"] == pytest.approx(rows[0]["nll 2"], abs=0.05)
  for name in ("config.json", "metrics.jsonl", "result.csv", "plot.png"):
    assert (tmp_path / name).stat().st_size > 0
  assert sparse_attention_lm.run(config, str(tmp_path)) == rows
  assert "a window is not worse at 4 times its length" in capsys.readouterr().out


def test_an_unknown_pattern_is_refused(tmp_path):
  with pytest.raises(ValueError, match="unknown pattern 'linformer'; allowed: all, full, window"):
    sparse_attention_lm.run(Config(patterns="linformer"), str(tmp_path))


def test_every_sparse_pattern_costs_fewer_flops_than_full_attention():
  config = Config()
  dense = presets.llama(config.vocab, config.width, config.layers, config.heads)
  flops = {
    name: cost.flops(with_mixer(dense, mixer, 512), length=512)
    for name, mixer in mixers(config).items()
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


def test_seeds_become_mean_and_spread_and_claims_are_read_off():
  rows = [row("full", 10, 12, 14), row("full", 12, 12, 16, seed=1), row("window", 20, 19, 18)]
  full, window = summarize(rows)
  assert (full["1×"], full["± 1×"]) == pytest.approx((11, math.sqrt(2)))
  assert (window["4×"], window["± 4×"]) == (pytest.approx(18), 0)
  held = claims({"full": full, "window": window})
  assert len(held) == 3 and all(held.values())
  better = summarize([row("full", 10, 9, 8), row("window", 5, 6, 7)])
  held = claims(dict(zip(("full", "window"), better, strict=True)))
  assert not any(held.values())
  assert harness.table([full], {"pattern": ""}).endswith("full")
