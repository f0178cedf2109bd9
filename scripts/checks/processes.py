"""Processes that do jobs by name; one that a job ends is replaced, and its last words are kept.

A process reads the names of jobs, one a line, and answers each with rows, a line of JSON each, and
an empty line. An exception ends it, as a crash of a driver does, and so does a job that takes more
than `PATIENCE` seconds.
"""

import concurrent.futures
import faulthandler
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Row = dict[str, Any]
PATIENCE = 180.0
LEFT_OUT = {"left out": "no time"}


def answer(run: Callable[[str], Iterable[Row]]) -> None:
  """The process's side: answers jobs with the rows of `run` until there are no more."""
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # what libraries print is not an answer
  for job in sys.stdin:
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    for row in run(job.strip()):
      print(json.dumps(row), file=answers, flush=True)
    print(file=answers, flush=True)
    faulthandler.cancel_dump_traceback_later()


class Worker:
  """A process of a module, started when it is needed.

  Args:
    command: gives the module and its arguments, at each start.
    environment: of the process, besides this one's.
  """

  def __init__(self, command: Callable[[], list[str]], environment: dict[str, str]):
    self._command, self._environment = command, os.environ | environment
    self._process: subprocess.Popen | None = None

  def start(self) -> subprocess.Popen:
    """The process, started if there was none."""
    if self._process is None:
      self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115
      self._process = subprocess.Popen(
        [sys.executable, "-m", *self._command()],
        env=self._environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=self._words,
        text=True,
      )
    return self._process

  def rows(self, job: str) -> Iterator[Row]:
    """Those of a job, as they come; the last one is an "error" if the process ended."""
    process = self.start()
    assert process.stdin and process.stdout
    try:
      print(job, file=process.stdin, flush=True)
      for line in iter(process.stdout.readline, "\n"):
        yield json.loads(line)
    except (BrokenPipeError, json.JSONDecodeError):  # no line at all, or a part of one
      process.communicate()
      yield {"error": f"exit {process.returncode}: {self._last_words()}"}
      self.stop()

  def kill(self) -> None:
    """Ends what it does; `rows` then says so."""
    if self._process:
      self._process.kill()

  def stop(self) -> None:
    """Ends the process, if there is one."""
    if self._process:
      self._process.kill()
      self._process.communicate()
      self._words.close()
      self._process = None

  def _last_words(self) -> str:
    self._words.seek(0)
    return self._words.read().strip()[-1500:]


def spread(
  workers: list[Worker], jobs: Iterable[str], end: float = math.inf
) -> Iterator[tuple[str, list[Row]]]:
  """Each job and its rows, by whichever worker is idle, as they are done; stops the workers.

  Args:
    end: on the clock of `time.monotonic`: jobs not done by then have `LEFT_OUT` as their last row.
  """
  idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
  for worker in workers:
    idle.put(worker)

  def run(job: str) -> tuple[str, list[Row]]:
    worker = idle.get()
    try:
      rows = list(worker.rows(job)) if time.monotonic() < end else [LEFT_OUT]
      cut = time.monotonic() >= end and rows and "error" in rows[-1]
      return job, [*rows[:-1], LEFT_OUT] if cut else rows
    finally:
      idle.put(worker)

  def late() -> None:
    for worker in workers:
      worker.kill()

  alarm = threading.Timer(end - time.monotonic(), late)
  try:
    if end < math.inf:
      alarm.start()
    with concurrent.futures.ThreadPoolExecutor(max(1, len(workers))) as pool:
      for done in concurrent.futures.as_completed([pool.submit(run, job) for job in jobs]):
        yield done.result()
  finally:
    alarm.cancel()
    for worker in workers:
      worker.stop()
