"""Damaged checkpoints: 60 random cases, and that a fault would be seen."""

import shutil
import sys

import numpy as np
import pytest

from effjax import models

pytest.importorskip("torch", reason="compares with transformers on torch, on Python 3.11 only")


@pytest.mark.slow
def test_damage_is_refused_or_computed_with_as_transformers_does(tmp_path):
  from scripts.checks import fuzz_models

  sys.addaudithook(fuzz_models._hook)
  counts, failures = fuzz_models.fuzz(60, 0, tmp_path)
  assert failures == []
  assert counts["refused"] > 20
  assert counts["loaded"] > 5


def test_what_would_be_a_fault_is_seen(tmp_path, monkeypatch):
  from scripts.checks import fuzz_models, model_damage

  monkeypatch.setattr(model_damage, "SHAPES", {"llama": model_damage.SHAPES["llama"]})
  sys.addaudithook(fuzz_models._hook)
  path = model_damage.bases(tmp_path)["llama"]
  right = fuzz_models.seen(models.load(path))
  assert fuzz_models.fault(path, right) == ("loaded", None)
  wrong = right | {"ids": [[1]] * 3}
  monkeypatch.setattr(fuzz_models, "of_transformers", lambda path, model: {})
  assert fuzz_models.fault(path, wrong) == (
    "loaded",
    "other ids, transformers: none",
  )
  (tmp_path / "outside").write_bytes(b"x")
  load = models.load

  def opens(path):
    np.fromfile(tmp_path / "outside", np.uint8)
    (tmp_path / "outside").read_bytes()
    return load(path)

  monkeypatch.setattr(models, "load", opens)
  assert "outside" in fuzz_models.fault(path, right)[1]
  shutil.rmtree(path)
  monkeypatch.setattr(models, "load", lambda path: {}["x"])
  assert fuzz_models.fault(path, right)[0] == "failed"
