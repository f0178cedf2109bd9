"""What measurements over seeds say of a claim: differences paired by seed, intervals, verdicts.

Runs of one seed begin and read alike, so their difference varies less than either; its mean over n
seeds lies within t · s / √n of the mean over all seeds, with t Student's quantile of n − 1 degrees
of freedom and s the standard deviation of the differences.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy import special

CONFIDENCE = 0.95
HELD, NOT_HELD, UNDECIDED = "held", "did NOT hold", "undecided"
MOST_SEEDS = 1000


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean with the interval that holds the mean over all seeds with `CONFIDENCE`.

  Attributes:
    mean: of the values.
    reach: half the width of the interval; infinite for a single value.
    spread: standard deviation of the values; None for a single one.
    count: number of values.
  """

  mean: float
  reach: float
  spread: float | None
  count: int

  @property
  def low(self) -> float:
    return self.mean - self.reach

  @property
  def high(self) -> float:
    return self.mean + self.reach


@dataclasses.dataclass(frozen=True)
class Verdict:
  """ "held", "did NOT hold" or "undecided", and the figures behind the word.

  Attributes:
    word: one of the three.
    reason: the interval; where undecided, what would decide it.
    difference: the interval itself; None where there is none.
    bounds: between which it was to lie.
  """

  word: str
  reason: str
  difference: Interval | None = None
  bounds: tuple[float, float] = (-math.inf, math.inf)

  def __str__(self) -> str:
    return f"{self.word} ({self.reason})"


def interval(values: Sequence[float]) -> Interval:
  """The Student-t interval of the mean of `values`.

  Raises:
    ValueError: for no value, or one that is not finite.

  Example:
    >>> found = interval([1.0, 2.0, 3.0])
    >>> found.mean, found.spread, round(found.reach, 3)
    (2.0, 1.0, 2.484)
  """
  x = np.asarray(values, np.float64)
  if x.size == 0 or not np.isfinite(x).all():
    raise ValueError(f"values={x.tolist()}; allowed: one or more finite numbers")
  if x.size == 1:
    return Interval(float(x[0]), math.inf, None, 1)
  spread = float(x.std(ddof=1))
  return Interval(float(x.mean()), _reach(spread, x.size), spread, x.size)


def deviation(values: Sequence[float]) -> float | None:
  """The standard deviation of values; None for a single one, NaN where one is not finite.

  Example:
    >>> deviation([1.0, 3.0, 5.0]), deviation([1.0]), deviation([1.0, math.inf])
    (2.0, None, nan)
  """
  if len(values) < 2:
    return None
  return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def paired(a: Sequence[float], b: Sequence[float]) -> Interval:
  """The interval of the mean of a − b; the two have a value of the same seed at each place.

  Raises:
    ValueError: for different numbers of values, none, or one that is not finite.

  Example:
    >>> paired([2.0, 3.0], [1.0, 2.0])
    Interval(mean=1.0, reach=0.0, spread=0.0, count=2)
  """
  if len(a) != len(b):
    raise ValueError(f"a has {len(a)} values and b {len(b)}; allowed: one of each seed in both")
  return interval([x - y for x, y in zip(a, b, strict=True)])


def less(a: Sequence[float], b: Sequence[float]) -> Verdict:
  """The verdict on "a is less than b", values of the same seeds.

  Held when the whole interval of a − b is below zero, not held when none of it is.

  Raises:
    ValueError: as `paired`.

  Example:
    >>> less([1.0, 1.1, 0.9], [2.0, 2.2, 1.9]).word
    'held'
  """
  return _judge(paired(a, b), -math.inf, 0.0)


def predicts_better(a: Sequence[float], b: Sequence[float]) -> Verdict:
  """The verdict on "runs paid fewer nats in a than in b"; undecided when one of them diverged.

  Raises:
    ValueError: for different numbers of values, or none.

  Example:
    >>> print(predicts_better([1.0, math.nan], [2.0, 2.0]))
    undecided (1 of 2 seeds diverged)
  """
  gone = int((~np.isfinite([a, b]).all(axis=0)).sum()) if len(a) == len(b) else 0
  return Verdict(UNDECIDED, f"{gone} of {len(a)} seeds diverged") if gone else less(a, b)


def alike(a: Sequence[float], b: Sequence[float], margin: float) -> Verdict:
  """The verdict on "a and b differ by less than `margin`", values of the same seeds.

  Held when the whole interval of a − b is within ± `margin`, not held when none of it is.

  Raises:
    ValueError: as `paired`, or for a margin that is not above 0.

  Example:
    >>> alike([1.0, 1.1], [1.0, 1.1], 0.01).word
    'held'
  """
  if not margin > 0:
    raise ValueError(f"margin={margin}; allowed: above 0")
  return _judge(paired(a, b), -margin, margin)


def _judge(found: Interval, low: float, high: float) -> Verdict:
  """Whether the mean over all seeds lies between `low` and `high`, both excluded."""
  figures = f"{found.mean:+.4f} ± {found.reach:.4f}, {found.count} seeds"
  said = lambda word, reason: Verdict(word, reason, found, (low, high))
  if low < found.low and found.high < high:
    return said(HELD, figures)
  if found.low >= high or found.high <= low:
    return said(NOT_HELD, figures)
  if found.spread is None:
    return said(UNDECIDED, f"{found.mean:+.4f}; one seed has no interval")
  room = min(abs(found.mean - bound) for bound in (low, high))
  return said(UNDECIDED, f"{figures}; {_wanted(found.spread, found.count, room)}")


def _wanted(spread: float, count: int, room: float) -> str:
  """How many seeds would decide, were their mean and spread those that were seen."""
  enough = (n for n in range(count, MOST_SEEDS + 1) if _reach(spread, n) < room)
  number = next(enough, None)
  if number is None:
    return f"more than {MOST_SEEDS} seeds would be needed at this spread"
  return f"{number} seeds would decide at this spread"


def _reach(spread: float, count: int) -> float:
  return float(special.stdtrit(count - 1, (1 + CONFIDENCE) / 2) * spread / math.sqrt(count))
