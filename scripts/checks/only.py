"""The flag of checks that can do some of their jobs."""

import re
from collections.abc import Iterable

from absl import flags

ONLY = flags.DEFINE_string("only", "", "Expression in the names of jobs, to do those alone.")


def chosen(jobs: Iterable[str]) -> list[str]:
  """Those that the flag names."""
  return [job for job in jobs if re.search(ONLY.value, job)]
