"""The choice among sizes of grouped products."""

import pytest

from effjax.kernels.grouped_matmul.sizes import Size
from scripts.checks import grouped, tune_grouped

SMALL, LARGE = Size(16, 32, 16), Size(64, 64, 16)


def test_the_size_that_is_fastest_in_all_is_chosen():
  times = {SMALL: 3.0, LARGE: 1.0, "ragged": 0.5}, {SMALL: 1.0, LARGE: 2.0}
  assert tune_grouped.best(list(times)) == LARGE
  assert tune_grouped.best([times[1]]) == SMALL
  with pytest.raises(SystemExit, match="no size"):
    tune_grouped.best([{"ragged": 1.0}])


def test_ragged_products_are_timed_beside_and_a_size_that_does_not_run_is_left_out(capsys):
  case = grouped.Case("float32", 32, "array", 32, 2, 16)
  found = tune_grouped.timed(case, "turned", "gpu", [SMALL, Size(24, 32, 16)], True)
  assert {SMALL, "ragged"} <= found.keys()
