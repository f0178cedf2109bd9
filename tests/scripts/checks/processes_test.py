"""Jobs done by processes, some of which they end."""

import textwrap
import time

import pytest

from scripts.checks.processes import LEFT_OUT, Worker, spread

MODULE = """
  import os
  import sys
  import time

  from scripts.checks import processes

  def run(job):
    print("no answer", flush=True)
    yield {"job": job, "start": sys.argv[1]}
    if job == "raises":
      raise ValueError("what was wrong")
    if job == "dies":
      os.abort()
    if job == "sleeps":
      processes.faulthandler.cancel_dump_traceback_later()
    if job in ("hangs", "sleeps"):
      time.sleep(60)

  processes.PATIENCE = 2.0
  processes.answer(run)
"""


@pytest.fixture
def workers(tmp_path):
  (tmp_path / "does_jobs.py").write_text(textwrap.dedent(MODULE))
  starts = iter("abcdef")
  command = lambda: ["does_jobs", next(starts)]
  environment = {"PYTHONPATH": f"{tmp_path}:."}
  return [Worker(command, environment) for _ in range(2)]


def test_a_process_that_a_job_ends_is_replaced_and_says_why(workers):
  worker = workers[0]
  first, error = worker.rows("raises")
  assert first == {"job": "raises", "start": "a"}
  assert error["error"].endswith("ValueError: what was wrong")
  assert list(worker.rows("plain")) == [{"job": "plain", "start": "b"}]
  assert [*worker.rows("dies")][-1]["error"].startswith("exit -6")
  assert "most recent call first" in [*worker.rows("hangs")][-1]["error"]
  worker.stop()


def test_jobs_are_shared_out_and_all_answered(workers):
  jobs = ["plain", "raises", "another", "third"]
  found = dict(spread(workers, jobs))
  assert found.keys() == set(jobs)
  assert [len(found[job]) for job in jobs] == [1, 2, 1, 1]
  assert list(spread([], [])) == []


def test_what_is_not_done_in_time_is_left_out(workers):
  assert len([*workers[0].rows("plain")]) == 1
  found = dict(spread(workers[:1], ["sleeps", "another"], time.monotonic() + 1.0))
  assert found["sleeps"][-1] == LEFT_OUT and found["another"] == [LEFT_OUT]
