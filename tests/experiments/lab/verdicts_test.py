"""Intervals against scipy's, and the verdict at the edges."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.lab import verdicts
from experiments.lab.verdicts import HELD, NOT_HELD, UNDECIDED, alike, interval, less, paired


def test_intervals_are_those_of_a_paired_t_test():
  draws = np.random.default_rng(0)
  for count in (2, 3, 7):
    a, b = draws.normal(size=(2, count))
    found = paired(a, b)
    theirs = stats.ttest_rel(a, b).confidence_interval(verdicts.CONFIDENCE)
    np.testing.assert_allclose((found.low, found.high), theirs)
    assert found.spread == pytest.approx(np.std(a - b, ddof=1))


def test_the_word_is_that_of_the_one_sided_side_of_the_interval():
  b = [1.0, 2.0, 3.0]
  shifted = lambda by, *noise: [x + by + e for x, e in zip(b, noise, strict=True)]
  assert less(shifted(-1, 0.01, 0.0, -0.01), b).word == HELD
  assert less(shifted(1, 0.01, 0.0, -0.01), b).word == NOT_HELD
  assert less(shifted(-0.1, 0.5, 0.0, -0.5), b).word == UNDECIDED


@pytest.mark.parametrize(("difference", "word"), [(-0.5, HELD), (0.0, NOT_HELD), (0.5, NOT_HELD)])
def test_zero_spread_decides(difference, word):
  assert less([1.0 + difference, 2.0 + difference], [1.0, 2.0]).word == word


def test_one_seed_decides_nothing():
  assert less([0.0], [9.0]).word == UNDECIDED
  assert "one seed has no interval" in less([0.0], [9.0]).reason
  assert math.isinf(interval([1.0]).reach)


@pytest.mark.parametrize(
  ("a", "b", "said"),
  [
    ([math.nan, 1.0], [1.0, 1.0], "finite"),
    ([math.inf], [1.0], "finite"),
    ([], [], "one or more"),
    ([1.0], [1.0, 2.0], "a has 1 values and b 2"),
  ],
)
def test_values_without_a_verdict_are_refused(a, b, said):
  with pytest.raises(ValueError, match=said):
    less(a, b)


def test_as_many_seeds_as_it_says_would_decide():
  differences = np.array([-0.1, 0.06, -0.3])
  verdict = less(differences, np.zeros(3))
  number = int(verdict.reason.split("; ")[1].split()[0])
  mean, spread = differences.mean(), differences.std(ddof=1)
  high = lambda n: mean + stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n)
  assert verdict.word == UNDECIDED
  assert high(number) < 0 <= high(number - 1)


def test_no_number_of_seeds_decides_a_mean_of_zero():
  assert "more than 1000 seeds" in less([1.0, -1.0], [0.0, 0.0]).reason


def test_alike_within_a_margin():
  base = [3.0, 3.1, 3.2]
  assert alike([3.0001, 3.1, 3.2001], base, 0.001).word == HELD
  assert alike([3.5, 3.6, 3.71], base, 0.001).word == NOT_HELD
  assert alike([2.5, 2.6, 2.71], base, 0.001).word == NOT_HELD
  assert alike([3.0, 3.2, 3.1], base, 0.05).word == UNDECIDED
  with pytest.raises(ValueError, match="margin=0"):
    alike(base, base, 0)
