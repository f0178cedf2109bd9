"""The roofline's arithmetic, against numbers worked out by hand from a report."""

import pytest

from effjax.attention import masks
from scripts.checks import balance, model
from scripts.checks.alone import HEADS, Case
from scripts.checks.model import Estimate

NAME = "NVIDIA H100 80GB HBM3"
CASE = Case.of("bfloat16-128-full")
RATES = {"matmul TFLOP/s": 700.0, "copy TB/s": 3.0}


@pytest.fixture(autouse=True)
def reported(monkeypatch):
  report = {"tile": "128×128", "rest": 800, "exponentials": 66, "useful": 0.5}
  monkeypatch.setattr(model, "_reports", lambda target: {(str(CASE), "forward"): report})


def test_each_part_of_a_kernel_without_a_mask():
  length, batch, cycles = 4096, 2, 132 * 1.98e9
  job = balance.job_of(CASE, "forward", NAME, length, batch)
  if (job.size.queries, job.size.keys) != (128, 128):
    pytest.skip("the report is of other tiles")
  found = model.estimate(CASE, "forward", masks.Full(), length, batch, RATES, NAME)
  heads = batch * HEADS
  assert found.products == pytest.approx(heads * 4 * length**2 * 128 / 700e12 / 0.5)
  squares = heads * (length / 128) ** 2
  assert found.instructions == pytest.approx(squares * 8 * 800 / (4 * cycles))
  assert found.powers == pytest.approx(squares * 8 * 66 * 32 / (16 * cycles))
  numbers = 2 * heads * length * 128 + 2 * heads // CASE.group * length * 128
  assert found.memory == pytest.approx(2 * numbers / 3e12)
  assert found.busy == balance.busy([32] * heads * 32, 132)


def test_kernels_follow_one_another():
  first, second = Estimate(3e-3, 1e-3, 0, 0, 0.5), Estimate(1e-3, 2e-3, 1e-3, 0, 1.0)
  assert (first.overlapped, first.serial, first.slowest) == (6e-3, 8e-3, "products")
  assert (second.overlapped, second.serial, second.slowest) == (2e-3, 4e-3, "instructions")


@pytest.mark.parametrize("name", ["cpu", "NVIDIA A100-SXM4-80GB"])
def test_no_columns_without_a_report_of_the_tiles(name, monkeypatch):
  monkeypatch.setattr(model, "_reports", lambda target: {})
  found = model.estimate(CASE, "forward", masks.Full(), 1024, 1, RATES, name)
  assert found is None
  assert model.columns(CASE, ["forward"], masks.Full(), 1024, 1, RATES) == {}
