"""Turns, rounds and patience, on a clock that calls turn."""

import pytest

from effjax.cost import timing


@pytest.fixture
def clock(monkeypatch):
  """A clock that only sleeping and calls move."""

  class Clock:
    now, slept = 0.0, 0.0

    def sleep(self, seconds):
      self.slept += seconds
      self.now += seconds

  clock = Clock()
  monkeypatch.setattr(timing.time, "sleep", clock.sleep)
  monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
  return clock


def contender(clock, name, order, seconds):
  """A call that takes the next of `seconds`, the last of them again and again."""
  left = list(seconds)

  def call():
    order.append(name)
    clock.now += left.pop(0) if len(left) > 1 else left[0]

  return call


def test_all_take_turns_and_the_first_round_does_not_count(clock):
  order: list[str] = []
  calls = {n: contender(clock, n, order, s) for n, s in (("a", [100.0, 3.0]), ("b", [9.0, 2.0]))}
  times = timing.interleaved(calls, 3)
  assert order == ["a", "b"] * 4
  assert times == {"a": [3.0] * 3, "b": [2.0] * 3}
  assert clock.slept == 6.0


def test_a_slow_one_is_timed_once(clock):
  order: list[str] = []
  calls = {n: contender(clock, n, order, [s]) for n, s in (("slow", 5.0), ("fast", 2.0))}
  times = timing.interleaved(calls, 3, patience=4.0, pause=0.5)
  assert times == {"slow": [5.0], "fast": [2.0] * 3}
  assert clock.slept == 2.0


def test_a_short_call_is_counted_the_second_time(clock):
  order: list[str] = []
  calls = {"a": contender(clock, "a", order, [9.0, 0.5, 0.25, 0.75, 0.125])}
  assert timing.interleaved(calls, 2) == {"a": [0.25, 0.125]}
  assert order == ["a"] * 5


def test_the_median_is_not_moved_by_a_disturbance():
  assert timing.medians({"a": [1.0, 50.0, 2.0], "b": [4.0]}) == {"a": 2.0, "b": 4.0}
