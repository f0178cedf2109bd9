"""Which scale and limits show a set of values, and which of them lie too far off to be shown."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from experiments.lab.plots.panels import LINEAR, LOG

WIDE = 100.0  # ratio of values from which on an axis is logarithmic, if nobody says how it is
FAR = 10.0  # an outlier makes the range of the others this much wider, and is as much larger
MARGIN = 0.06  # of the range, on either side


@dataclasses.dataclass(frozen=True)
class Scale:
  """An axis.

  Attributes:
    log: whether it is logarithmic.
    low, high: its limits.
  """

  log: bool
  low: float
  high: float

  def shows(self, values: float | np.ndarray) -> np.ndarray:
    """Whether each value has a place on the axis or beyond it: finite, and above 0 if `log`."""
    return np.isfinite(values) & ((np.asarray(values) > 0) | (not self.log))


def fitted(
  values: Iterable[float],
  always: Iterable[float] = (),
  bars: Iterable[float] = (),
  scale: str | None = None,
  margin: float = MARGIN,
) -> Scale:
  """The scale for `values`, of which up to a quarter, far from the others, may lie beyond it.

  Args:
    values: what is shown; what is not finite is left out.
    always: what lies within the limits whatever the values are.
    bars: ends of bars, which lie within unless they would make the range `FAR` times as wide.
    scale: "log", "linear", which shows all, or None.
    margin: part of the range that is left free on either side.

  Example:
    >>> fitted([1.0, 2.0, 4.0]).log, fitted([1.0, 2.0, 400.0]).log
    (False, True)
    >>> fitted([3.1, 3.2, 3.3, 3300.0]).high < 4
    True
  """
  fixed, kept = _finite(always), _finite(values)
  while scale != LINEAR and (rest := _without_outliers(kept, fixed, scale)) is not kept:
    kept = rest
  shown = np.concatenate([kept, fixed])
  log = _is_log(shown, scale)
  shown = shown[shown > 0] if log else shown
  if not shown.size:
    return Scale(log, *((1.0, 10.0) if log else (0.0, 1.0)))
  to, back = (np.log, np.exp) if log else (np.asarray, np.asarray)
  low, high = _with_bars(to(shown), to(_positive(_finite(bars), log)))
  free = margin * (high - low) or _around(low, log)
  return Scale(log, float(back(low - free)), float(back(high + free)))


def _without_outliers(kept: np.ndarray, fixed: np.ndarray, scale: str | None) -> np.ndarray:
  """`kept` without the fewest values that are far off at one end; itself when there are none."""
  ordered = np.sort(kept)
  for count in range(1, max(1, len(kept) // 4) + 1):
    for far, rest in (
      (ordered[-count:], ordered[:-count]),
      (ordered[:count], ordered[count:]),
    ):
      if _are_far(far, np.concatenate([rest, fixed]), scale):
        return rest
  return kept


def _are_far(far: np.ndarray, rest: np.ndarray, scale: str | None) -> bool:
  if len(rest) < 3:
    return False
  every = np.concatenate([far, rest])
  log = _is_log(every, scale)
  to = lambda x: np.log(_positive(x, log)) if log else x
  if not len(to(far)) or not len(to(rest)):
    return False
  wide = np.ptp(to(rest))
  wider = wide > 0 and min(np.ptp(np.append(to(rest), x)) for x in to(far)) >= FAR * wide
  larger = np.abs(far).min() >= FAR * np.abs(rest).max()
  smaller = far.min() > 0 and rest.min() >= FAR * far.max()
  return bool(wider and (larger or smaller))


def _is_log(values: np.ndarray, scale: str | None) -> bool:
  if scale is not None or not values.size:
    return scale == LOG
  least = values.min()
  return bool(least > 0 and np.log(values.max()) - np.log(least) >= np.log(WIDE))


def _with_bars(shown: np.ndarray, ends: np.ndarray) -> tuple[float, float]:
  low, high = shown.min(), shown.max()
  reach = FAR * (high - low) if high > low else np.inf
  near = ends[(low - ends <= reach) & (ends - high <= reach)]
  return min([low, *near]), max([high, *near])


def _around(value: float, log: bool) -> float:
  """Half the range where there is a single value."""
  return np.log(2) if log else abs(value) / 10 or 1.0


def _positive(values: np.ndarray, log: bool) -> np.ndarray:
  return values[values > 0] if log else values


def _finite(values: Iterable[float]) -> np.ndarray:
  found = np.array(list(values), float)
  return found[np.isfinite(found)]
