"""Windows and sinks on a tiny random model: who is seen, what is read, what is claimed."""

import dataclasses
import math

import numpy as np
import pytest

from effjax.attention import masks
from experiments.attention import pretrained_window as study

TINY = study.Config(model="tiny", text="stdlib", rows=2, length=64, windows="16,32", sinks="0,4")


@pytest.fixture(scope="module")
def reader():
  return study.Reader(TINY)


@pytest.mark.parametrize(("window", "sinks"), [(8, 0), (8, 1), (8, 4), (3, 2)])
def test_a_token_sees_as_many_keys_whatever_the_sinks(window, sinks):
  seen = np.asarray((masks.Causal() & study.windowed(window, sinks)).dense(20))
  places = np.arange(20)
  np.testing.assert_array_equal(seen.sum(1), np.minimum(places + 1, window))
  assert seen.diagonal().all() and seen[sinks:, :sinks].all()
  assert not np.triu(seen, 1).any()


def test_a_narrowed_model_keeps_its_own_masks(reader):
  subject, _ = reader._ready
  own = subject.config.layers[0].mixer.mask
  narrow = study.narrowed(subject, masks.SlidingWindow(3, 0))
  seen = narrow.config.layers[-1].mixer.mask.dense(9)
  assert (seen == (own & masks.SlidingWindow(3, 0)).dense(9)).all()


def test_what_lies_within_the_window_is_read_as_before(reader):
  subject, batches = reader._ready
  whole = study.read(subject, batches[0])
  same = study.read(study.narrowed(subject, study.windowed(64, 4)), batches[0])
  np.testing.assert_allclose(same, whole, atol=1e-4)
  near = study.read(study.narrowed(subject, study.windowed(16, 4)), batches[0])
  np.testing.assert_allclose(near[:, :16], whole[:, :16], atol=1e-4)
  assert abs(near[:, 16:] - whole[:, 16:]).max() > 1e-3


def test_afresh_is_the_model_on_pieces(reader):
  subject, batches = reader._ready
  cut = study.pieces(batches[0], 32)
  assert cut["tokens"].shape == (3, 32)
  np.testing.assert_array_equal(cut["tokens"][1, 1:], batches[0]["tokens"][0, 17:48])
  np.testing.assert_array_equal(cut["tokens"][:, 0], batches[0]["tokens"][0, [0, 0, 0]])
  np.testing.assert_array_equal(cut["targets"][1], batches[0]["targets"][0, 16:48])
  row = reader.afresh(32)
  own = [study.read(subject, study.pieces(batch, 32)) for batch in batches]
  third = np.mean([nll[1, 16:] for nll in own])  # positions 32 … 47 are the second piece's
  assert row["curve"][2] == pytest.approx(third)
  assert row["nll"] == pytest.approx(np.mean(row["curve"]))


def test_perplexities_behind_the_window():
  full = {"name": "full", "window": None, "sinks": 0, "nll": 1.0, "curve": [2.0, 1.0, 0.0, 1.0]}
  window = {**full, "name": "w", "window": 32, "curve": [2.0, 1.0, 1.0, 2.0]}
  rows = study.compared([full, window])
  assert rows[0]["ratio"] == 1 and "curve" not in rows[1]
  assert rows[1]["after"] == pytest.approx(math.exp(1.5))
  assert rows[1]["full after"] == pytest.approx(math.exp(0.5))
  assert rows[1]["ratio"] == pytest.approx(math.e)


def test_claims():
  row = lambda sinks, ratio: {"name": "w", "sinks": sinks, "ratio": ratio}
  rows = [row(0, 3.0), row(1, 1.2), row(4, 1.15), row(None, 1.1)]
  assert list(study.claims(rows).values()) == [True, True, False, True]
  rows = [row(0, 1.9), row(1, 1.0), row(4, 1.05), row(None, 1.0)]
  assert list(study.claims(rows).values()) == [False, False, True, False]
  assert study.claims([row(None, 1.0)]) == {}


@pytest.mark.parametrize(
  ("wrong", "words"),
  [
    ({"windows": "16,x"}, "windows='16,x'; allowed: integers"),
    ({"windows": "24"}, "windows='24', length=64; allowed: multiples of 16"),
    ({"windows": "64"}, "windows='64', length=64"),
    ({"length": 112, "windows": "64"}, "windows='64', length=112"),
    ({"length": 72}, "length=72"),
    ({"windows": ""}, "windows=''"),
    ({"sinks": "16"}, "sinks='16'; allowed: from 0 and less than the least window, 16"),
    ({"rows": 10_000}, r"rows=10000; allowed: up to \d+, the documents of 'pydoc'"),
  ],
)
def test_what_does_not_fit_is_named(wrong, words, tmp_path):
  config = dataclasses.replace(TINY, **{"text": "pydoc", **wrong})
  with pytest.raises(ValueError, match=words):
    study.run(config, str(tmp_path))


def test_a_run_measures_and_resumes(tmp_path):
  rows = study.run(TINY, str(tmp_path))
  assert [(row["window"], row["sinks"]) for row in rows] == [
    (None, 0), (16, 0), (16, 4), (16, None), (32, 0), (32, 4), (32, None)
  ]  # fmt: skip
  assert all(math.isfinite(row["perplexity"]) for row in rows)
  for name in ("config.json", "metrics.jsonl", "result.csv", "plot.png"):
    assert (tmp_path / name).stat().st_size > 0
  assert study.run(TINY, str(tmp_path)) == rows
