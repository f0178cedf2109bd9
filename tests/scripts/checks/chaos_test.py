"""Ten faults of `scripts/chaos`; a hundred are its own affair."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_whatever_happens_a_run_ends_as_if_it_had_not_or_says_why():
  command = [sys.executable, "-m", "scripts.checks.chaos", "--faults=10"]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
  assert done.returncode == 0, done.stdout + done.stderr[-2000:]
  result = json.loads(done.stdout.splitlines()[-1])
  assert result["faults"] == sum(result["ended"].values()) == 10 and result["failures"] == 0
