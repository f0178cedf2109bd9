"""Random problems through every implementation, and that an error would be seen."""

import numpy as np
import pytest

from effjax.kernels.flash_attention import cases
from scripts.checks import fuzz


@pytest.mark.parametrize("seed", [2])
def test_a_few_random_problems(seed):
  _, failures = fuzz.fuzz(3, 3, seed)
  assert not failures


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20, 26))
def test_random_problems(seed):
  worst, failures = fuzz.fuzz(10, 10, seed)
  assert not failures and {label.split()[0] for label in worst} >= {"xla", "gpu"}


def test_errors_are_relative_and_strict_about_infinities():
  want = np.array([3.0, 4.0, -np.inf])
  assert cases.errors((np.array([3.0, 4.5, -np.inf]),), (want,)) == {"out": 0.1}
  assert cases.errors((np.array([3.0, 4.0, 0.0]),), (want,)) == {"out": np.inf}
  assert cases.errors((np.array([1e-3]),), (np.zeros(1),)) == {"out": pytest.approx(0.01)}


def test_the_first_seeds_draw_every_kind_of_mask_and_option():
  drawn = [fuzz.structure(np.random.default_rng(seed)) for seed in range(40)]
  for one_of in ("dtype", "softcap", "segments", "positions"):
    assert len({getattr(problem, one_of) for problem in drawn}) > 1
  text = " ".join(repr(p.draw(np.random.default_rng(0))[1]["mask"]) for p in drawn)
  for kind in ("And", "Or", "Not", "Causal", "Dilated", "Documents", "Global", "RandomBlocks"):
    assert kind in text
