"""The simulation of a launch against time counted tick by tick, its tiles against a dense mask."""

import jax
import numpy as np
import pytest

from effjax.attention import masks
from effjax.kernels.flash_attention.fused import pieces
from scripts.checks import balance
from scripts.checks.alone import HEADS, Case


def ticks(work: list[int], slots: int) -> int:
  """How long programs take that are launched in order, counted one tick after the other."""
  waiting, running, time = list(work), [], 0
  while waiting or running:
    while waiting and len(running) < slots:
      running.append(waiting.pop(0))
    running = [left - 1 for left in running if left > 1]
    time += 1
  return time


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_share_of_the_time_that_slots_work(slots):
  rng = np.random.default_rng(slots)
  for count in (1, 5, 40):
    work = rng.integers(1, 9, count).tolist()
    assert balance.busy(work, slots) == pytest.approx(sum(work) / (slots * ticks(work, slots)))


def test_no_work_is_in_balance():
  assert balance.busy([0, 0], 4) == 1.0


@pytest.mark.parametrize("kernel", ["forward", "queries", "keys"])
@pytest.mark.parametrize("name", ["causal", "longformer"])
def test_tiles_of_all_programs_are_those_of_the_dense_mask(kernel, name, monkeypatch):
  monkeypatch.setattr(pieces, "_long", lambda lengths, programs: np.ones_like(lengths))
  case, length, batch = Case.of(f"bfloat16-128-{name}"), 1024, 2
  mask = masks.Causal() if name == "causal" else masks.longformer(100, 2)
  job = balance.job_of(case, kernel, "NVIDIA H100", length, batch)
  full, partial = balance.tiles(job, kernel, mask)
  q, k = job.size.queries, job.size.keys
  dense = np.asarray(mask.dense(length)).reshape(length, length)
  dense = dense.reshape(length // q, q, length // k, k).swapaxes(1, 2)
  every, some = dense.all((2, 3)), dense.any((2, 3))
  axis, repeats = (0, HEADS // case.group) if kernel == "keys" else (1, HEADS)
  per = case.group if kernel == "keys" else 1
  count = lambda tiles: sorted(np.tile(per * tiles.sum(axis), repeats * batch).tolist())
  assert sorted((full + partial).tolist()) == count(some)
  assert full.sum() <= sum(count(every))
  if name == "causal":
    assert sorted(full.tolist()) == count(every)


@pytest.mark.parametrize("kernel", ["forward", "queries", "keys"])
def test_long_lists_are_simulated_in_pieces(kernel, monkeypatch):
  case, mask = Case.of("bfloat16-128-longformer"), masks.longformer(256, 2)
  job = balance.job_of(case, kernel, "NVIDIA H100", 4096)
  cut = balance.tiles(job, kernel, mask)
  monkeypatch.setattr(pieces, "_long", lambda lengths, programs: np.ones_like(lengths))
  whole = balance.tiles(job, kernel, mask)
  for some, every in zip(cut, whole, strict=True):
    assert some.sum() == every.sum() and some.size > every.size
  assert sum(cut).max() < sum(whole).max() / 2


def test_what_is_simulated_follows_the_order_of_launch():
  case, kernel = Case.of("bfloat16-128-causal"), "forward"
  found = balance.simulated(case, kernel, "NVIDIA H100", 132, 1.0)
  assert list(found) == ["busy 4k", "busy 8k", "busy 16k"]
  job = balance.job_of(case, kernel, "NVIDIA H100", 4096)
  full, partial = balance.tiles(job, kernel, masks.Causal())
  assert jax.numpy.asarray(full).size == job.tiles[0] * HEADS
  assert found["busy 4k"] == round(balance.busy((full + partial).tolist(), 132), 3)
