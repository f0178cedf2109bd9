"""How evenly a table loads its experts."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from effjax.core.known import check_ids, number
from effjax.core.typing import Array, Float, Integer, Num, Number, Size
from effjax.moe.hash_tables.balanced import checked_counts


@dataclasses.dataclass(frozen=True)
class TableStatistics:
  """What a table makes of given counts.

  Attributes:
    load: [E], each expert's share of all occurrences; they sum to one.
    max_load: the busiest expert's over the mean expert's: 1 is balanced, E the worst.
    entropy: of the load, in nats: log E is balanced, 0 the worst.
    unused: experts without load.
  """

  load: Float[np.ndarray, "E"]
  max_load: float
  entropy: float
  unused: int


def statistics(
  table: Integer[Array | np.ndarray, "V *N"],
  counts: Num[Array | np.ndarray, "_"] | Sequence[Number] | None = None,
  *,
  experts: Size,
) -> TableStatistics:
  """Balance and entropy of the load of E experts, where each id occurs so many times.

  Args:
    table: [V], the expert of each id, or [V, N], its N experts, all of which count.
    counts: [V], how often each id occurs; None is once.
    experts: number of experts E.

  Raises:
    ValueError: for counts of another length than the table, or that sum to 0, and for experts that
      are none of 0 … E − 1.

  Example:
    >>> found = statistics(np.array([0, 1, 1]), [2, 1, 1], experts=4)
    >>> found.load.tolist(), found.max_load, round(found.entropy, 4), found.unused
    ([0.5, 0.5, 0.0, 0.0], 2.0, 0.6931, 2)
  """
  table = np.asarray(table)
  experts = number("experts", experts, of="statistics", integer=True, least=1)
  check_ids("table", table, experts)
  counts = checked_counts(np.ones(len(table)) if counts is None else counts)
  if len(counts) != len(table) or not counts.any():
    given = f"{len(counts)} counts of sum {counts.sum():g}"
    raise ValueError(f"statistics: {given}; allowed: {len(table)} as the table has, not all 0")
  columns = table.reshape(len(table), -1)
  weights = np.repeat(counts, columns.shape[1])
  load = np.bincount(columns.reshape(-1), weights, experts) / weights.sum()
  entropy = -float(sum(share * np.log(share) for share in load if share > 0))
  return TableStatistics(load, experts * float(load.max()), entropy, int((load == 0).sum()))
