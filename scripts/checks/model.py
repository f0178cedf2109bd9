"""What attention on a GPU should take by the reports of its compiler: a simple roofline.

Products take their time at the rate of a large product in the same run; every other instruction of
a warp takes a slot of a scheduler; powers of two take the special-function units; and each array is
read or written once, at the rate of a large copy.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax

from scripts.checks import balance, kernel_table
from scripts.checks.alone import Case
from scripts.checks.processes import Row
from scripts.checks.sass import PRODUCTS
from scripts.checks.targets import GPU, TARGETS

_SLOTS, _POWERS = 4, 16  # of a multiprocessor in a cycle: instructions of warps, powers of two
_ARRAYS = {"forward": (2, 2), "queries": (3, 2), "keys": (2, 4)}  # as large as queries, as keys


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of a kernel by what takes them, and the share of the time that the device is busy.

  Example:
    >>> both = Estimate(products=3.0, instructions=2.0, powers=1.0, memory=0.5, busy=0.5)
    >>> both.overlapped, both.serial, both.slowest
    (6.0, 13.0, 'products')
  """

  products: float
  instructions: float
  powers: float
  memory: float
  busy: float

  @property
  def overlapped(self) -> float:
    """Where the slowest part hides the others."""
    return max(self._parts.values()) / self.busy

  @property
  def serial(self) -> float:
    """Where none hides any other."""
    return sum(self._parts.values()) / self.busy

  @property
  def slowest(self) -> str:
    """The name of the part that takes most."""
    return max(self._parts, key=self._parts.__getitem__)

  @property
  def _parts(self) -> dict[str, float]:
    return {name: x for name, x in dataclasses.asdict(self).items() if name != "busy"}


def columns(
  case: Case, kernels: Iterable[str], mask: Any, length: int, batch: int, rates: Row
) -> Row:
  """Of a row: what kernels take, one after the other; empty where one has no estimate."""
  found = [estimate(case, kernel, mask, length, batch, rates) for kernel in kernels]
  known = [each for each in found if each is not None]
  if len(known) < len(found):
    return {}
  longest = max(known, key=lambda each: each.overlapped)
  return {
    "model ms": 1e3 * sum(each.overlapped for each in known),
    "no overlap ms": 1e3 * sum(each.serial for each in known),
    "busy": longest.busy,
    "bound by": longest.slowest,
  }


def estimate(
  case: Case, kernel: str, mask: Any, length: int, batch: int, rates: Row, name: str | None = None
) -> Estimate | None:
  """Of one kernel, None where there is no report of its tiles.

  Args:
    batch: rows of `alone.HEADS` query heads.
    rates: "matmul TFLOP/s" and "copy TB/s" of the device.
    name: the device's, by default of the one that is here.
  """
  name = name or jax.devices()[0].device_kind
  target = next((each for each, x in TARGETS.items() if x.name[:8] == name[:8]), None)
  report = _reports(target).get((str(case), kernel), {}) if target else {}
  if target is None or "useful" not in report:
    return None
  job, device = balance.job_of(case, kernel, name, length, batch), TARGETS[target]
  if report["tile"] != f"{job.size.queries}×{job.size.keys}":
    return None
  assert isinstance(device, GPU)
  rest = report["rest"] if "rest" in report else report["partial"]
  weight = report.get("partial", rest) / rest
  full, partial = balance.tiles(job, kernel, mask)
  work = full + weight * partial
  pairs = float(full.sum() + partial.sum()) * job.size.queries * job.size.keys
  squares = float(work.sum()) * job.size.queries * job.size.keys / 128**2
  cycles = device.cores * device.clock * 1e9
  of_queries, of_keys = _ARRAYS[kernel]
  numbers = of_queries * job.query.size + of_keys * job.key.size
  products = 2 * PRODUCTS[kernel] * pairs * case.width / report["useful"]
  return Estimate(
    products=products / (rates["matmul TFLOP/s"] * 1e12),
    instructions=8 * rest * squares / (_SLOTS * cycles),
    powers=8 * 32 * report["exponentials"] * pairs / 128**2 / (_POWERS * cycles),
    memory=numbers * job.query.dtype.itemsize / (rates["copy TB/s"] * 1e12),
    busy=balance.busy(work.tolist(), device.cores),
  )


@functools.cache
def _reports(target: str) -> dict[tuple[str, str], Row]:
  """Of the last run of `kernels.py`."""
  last = kernel_table.runs(target)[-1:]
  rows = [row for name in last for row in kernel_table.saved(name, target)]
  return {(row["case"], row["kernel"]): row for row in rows}
