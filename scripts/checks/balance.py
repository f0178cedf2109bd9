"""How busy a GPU's multiprocessors are, simulated: programs start in the order of their launch."""

import heapq
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from effjax.kernels.flash_attention.fused import programs
from effjax.kernels.flash_attention.fused.jobs import Job
from effjax.kernels.flash_attention.fused.pieces import Pieces, lengths_of, longest_first
from effjax.kernels.flash_attention.fused.sizes import Size
from effjax.kernels.flash_attention.tile_map.blocks import TileList, tile_lists
from effjax.kernels.flash_attention.tile_map.sight import Sight, Where
from scripts.checks.alone import MASKS, Case, program

LENGTHS = (4096, 8192, 16384)


def busy(work: Iterable[float], slots: int) -> float:
  """Share of the time that slots work, when each takes the next program as soon as it is free.

  Example:
    >>> busy([1, 1, 2], slots=2), busy([2, 1, 1], slots=2)
    (0.6666666666666666, 1.0)
  """
  free = [0.0] * slots
  total = 0.0
  for each in work:
    heapq.heappush(free, heapq.heappop(free) + each)
    total += each
  return total / (slots * max(free)) if total else 1.0


def job_of(case: Case, kernel: str, device: str, length: int, batch: int = 1) -> Job:
  """What a kernel works on, in the tiles for a device of that name."""
  jobs: list[Job] = []
  run = program(case, kernel, "gpu", case.sizes("gpu", length, device), watch=jobs.append)
  jax.eval_shape(run, *case.arguments(kernel, length, batch))
  return jobs[-1]


def tiles(job: Job, kernel: str, mask: Any) -> tuple[np.ndarray, np.ndarray]:
  """Tiles without a predicate, and with one, of each program in the order of launch.

  Args:
    mask: of batch one, and concrete.
  """
  (B, T, N, _), S, by_keys = job.query.shape, job.key.shape[1], kernel == "keys"
  heads, group = (N // job.group, job.group) if by_keys else (N, 1)
  lists = _listed(mask, T, S, job.size, by_keys)
  order = None
  if isinstance(job.lists.offset, np.ndarray):
    cut = Pieces.of(lists, B * heads, group)
    lists, order = cut.lists, cut.order
  else:  # known to the device alone, which puts them in order
    order = longest_first(lengths_of(lists, group))
  place = (programs.by_columns if by_keys else programs.by_rows)(job, lists.partial.shape[-1])
  ids = np.indices(place.grid).reshape(len(place.grid), -1, order="F")
  head = np.asarray(jax.vmap(place.axes["m" if by_keys else "n"][1])(*ids))
  piece = ids[programs.PIECES]
  if order is not None:
    piece = order[0, head * group % order.shape[1], piece]
  full = lists.partial - lists.offset[..., :-1]
  both = np.stack([full, np.diff(lists.offset) - full], axis=-1)[0]  # [heads, pieces, 2]
  both = np.broadcast_to(both, (N, *both.shape[1:])).reshape(heads, group, -1, 2).sum(1)
  full, partial = both[head, piece].T
  return full, partial


def _listed(mask: Any, T: int, S: int, size: Size, by_keys: bool) -> TileList:
  """[1, heads, …] of a concrete mask."""
  sight = Sight.of(Where(jax.tree.map(np.asarray, mask), None, None), T, S, size.queries, size.keys)
  return tile_lists(sight, -(-T // size.queries), -(-S // size.keys), by_columns=by_keys)


def simulated(case: Case, kernel: str, device: str, slots: int, weight: float) -> dict[str, float]:
  """`busy` for one batch row of each length, by "busy 4k" and so on; documents are of 1024.

  Args:
    weight: of a tile with a predicate, that of one without being one.
  """
  found = {}
  for length in LENGTHS:
    mask = MASKS[case.mask](np.arange(length)[None] // 1024)
    full, partial = tiles(job_of(case, kernel, device, length), kernel, mask)
    share = busy((full + weight * partial).tolist(), slots)
    found[f"busy {length // 1024}k"] = round(share, 3)
  return found
