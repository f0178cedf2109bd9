"""Times of attention on a GPU: rates, shares of the matrix product's, ratios to peers.

`gpu.py` starts it as a process that is given the names of all its jobs, compiles for them side by
side, and then answers one at a time with its rows.
"""

import concurrent.futures
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import jax
from absl import app

from scripts.checks import gpu_jobs
from scripts.checks.processes import Row, answer

Contender = tuple[Callable[[], Any], Callable[[Any], Any]]  # starts work; waits for what it gave
Name = TypeVar("Name")
ENOUGH = 0.05  # seconds of work between two looks at the clock


def medians(contenders: dict[str, Contender], rounds: int = 7) -> dict[str, float]:
  """Seconds of a call, taking turns; a turn is as many calls as fill `ENOUGH`, waited for once."""
  count = {name: _calls(contender) for name, contender in contenders.items()}
  times: dict[str, list[float]] = {name: [] for name in contenders}
  for _ in range(rounds):
    for name, contender in contenders.items():
      times[name].append(_seconds(contender, count[name]))
  return {name: statistics.median(each) for name, each in times.items()}


def _calls(contender: Contender) -> int:
  _seconds(contender, 3)
  return max(1, round(ENOUGH / _seconds(contender, 3)))


def _seconds(contender: Contender, calls: int) -> float:
  call, wait = contender
  start = time.perf_counter()
  for _ in range(calls):
    last = call()
  wait(last)
  return (time.perf_counter() - start) / calls


def compiled(programs: dict[Name, tuple[Callable, Any]]) -> dict[Name, Future]:
  """Programs of arguments, or of their shapes, as they are compiled; some may hold exceptions."""

  def one(program: Callable, arguments: Any) -> Any:
    return jax.jit(program).lower(*arguments).compile()

  pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
  return {name: pool.submit(one, *each) for name, each in programs.items()}


def timed(job: gpu_jobs.Job, programs: dict[str, Future], device: Row) -> Iterator[Row]:
  """Its rows, after an "error" for each contender that does not compile or run."""
  arguments = job.arguments()
  start = lambda future: (functools.partial(future.result(), *arguments), jax.block_until_ready)
  makers = {by: functools.partial(start, future) for by, future in programs.items()}
  contenders = {}
  for by, make in (makers | job.peers(arguments)).items():
    try:
      contender = make()
      _seconds(contender, 1)
    except Exception as error:  # whatever a compiler or a driver raises is the finding
      yield {"error": f"{by}: {type(error).__name__}: {str(error)[:1500]}"}
    else:
      contenders[by] = contender
  yield from job.rows(medians(contenders), device)


def main(arguments: list[str]) -> None:
  lengths, *names = arguments[1:]
  every = gpu_jobs.jobs([int(n) for n in lengths.split(",")])
  jobs = {name: every[name] for name in ["device", *names]}
  shapes = {name: jax.eval_shape(job.arguments) for name, job in jobs.items()}
  ready = compiled(
    {(name, by): (run, shapes[name]) for name in jobs for by, run in jobs[name].programs().items()}
  )

  def rows(name: str) -> Iterator[Row]:
    programs = {by: future for (job, by), future in ready.items() if job == name}
    return timed(jobs[name], programs, {} if name == "device" else device())

  device = functools.cache(lambda: next(rows("device")))
  answer(lambda name: [device()] if name == "device" else rows(name))


if __name__ == "__main__":
  app.run(main)
