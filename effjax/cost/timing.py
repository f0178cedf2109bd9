"""Timing contenders against one another on a machine whose speed drifts."""

import statistics
import time
from collections.abc import Callable, Mapping

from tqdm import tqdm

_BRIEF = 2.0  # seconds


def interleaved(
  contenders: Mapping[str, Callable[[], object]],
  rounds: int,
  *,
  patience: float = 30.0,
  pause: float = 1.0,
) -> dict[str, list[float]]:
  """Seconds of each call that waits for its result; in every round all take a turn.

  A round that is not counted goes first, with compilation. A pause of `pause` seconds before each
  turn lets the one before give its memory back, which a runtime may do after its result is ready. A
  call of less than two seconds is made twice and counted the second time: after a rest, a core
  needs a while to regain its speed. A contender that took longer than `patience` seconds in the
  first counted round sits out the later ones.

  Example:
    >>> times = interleaved({"a": lambda: None, "b": lambda: None}, 3, pause=0.0)
    >>> {name: len(seconds) for name, seconds in times.items()}
    {'a': 3, 'b': 3}
  """
  for call in contenders.values():
    call()
  times: dict[str, list[float]] = {name: [] for name in contenders}
  for _ in tqdm(range(rounds), unit="round", leave=False):
    for name, call in contenders.items():
      if times[name] and times[name][0] > patience:
        continue
      time.sleep(pause)
      seconds = _seconds(call)
      times[name].append(_seconds(call) if seconds < _BRIEF else seconds)
  return times


def _seconds(call: Callable[[], object]) -> float:
  start = time.perf_counter()
  call()
  return time.perf_counter() - start


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
  """The median of each contender.

  Example:
    >>> medians({"a": [1.0, 9.0, 2.0]})
    {'a': 2.0}
  """
  return {name: statistics.median(values) for name, values in times.items()}
