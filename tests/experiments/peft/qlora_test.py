"""QLoRA's account on a tiny random model: bytes by hand, and what is claimed of which arms."""

import dataclasses

import jax
import pytest

from effjax.train import init_state
from experiments import harness
from experiments.lab.subject import load
from experiments.peft import qlora
from experiments.peft.tuning import account, adamw

TINY = qlora.Config(model="tiny", text="pydoc", length=16, steps=2, rows=1, arms="qlora")
PARAMETERS, KERNELS, FACTORS, MATRICES = 131_392, 98_304, 19_456, 14
SCALES = 4 * MATRICES  # α/r, frozen too


def test_a_run_accounts_for_every_byte(tmp_path):
  (row,) = qlora.run(TINY, str(tmp_path))
  # Four bits a weight; a constant of 8 bits for 64 weights, and for 256 of those one of 32.
  rounded = KERNELS / 2 + KERNELS / 64
  assert 0 <= row["frozen"] - (4 * (PARAMETERS - KERNELS) + rounded + SCALES) < rounded / 10
  assert row["trained"] == 4 * FACTORS
  assert 0 <= row["optimiser"] - 2 * row["trained"] <= 64  # moments, and the steps taken
  assert row["loss"] != row["loss_before"] and row["peak"] > qlora.total(row)
  assert {"metrics.jsonl", "plot.png", "result.csv"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
  "arm, frozen, trained", [("lora", PARAMETERS + MATRICES, FACTORS), ("full", 0, PARAMETERS)]
)
def test_in_float32_bytes_are_four_times_the_numbers(arm, frozen, trained):
  params = qlora.ARMS[arm](load("tiny")[0]).params
  found = account(jax.eval_shape(lambda: init_state(params, adamw(1e-3, 10))))
  assert found["frozen"] == 4 * frozen and found["trained"] == 4 * trained
  assert 0 <= found["optimiser"] - 8 * trained <= 64


def test_claims_are_about_what_was_run():
  def row(arm, seed, loss, frozen=0, trained=1):
    sizes = {"frozen": frozen, "trained": trained, "optimiser": 2 * trained, "peak": frozen + 9}
    return {"arm": arm, "seed": seed, "loss": loss, "loss_before": 4.0, "seconds": 1.0} | sizes

  full = [row("full", seed, 2.0 + seed, trained=100) for seed in (0, 1)]
  plain = [row("lora", seed, 2.0 + seed, frozen=100) for seed in (0, 1)]
  small = [row("qlora", seed, 2.1 + seed, frozen=50) for seed in (0, 1)]
  words = lambda rows: [found.split(":")[0] for found in harness.findings(qlora.claims(rows))]
  assert words(full + plain + small) == ["held", "held", "undecided"]
  assert qlora.claims(full) == {} and len(qlora.claims(plain + small)) == 2
  lines = {line["arm"]: line for line in qlora.summarize(full + plain + small)}
  assert (
    lines["qlora"]["of full"] == 53 / 300 and lines["qlora"]["of lora"] == (2.1 / 2 + 3.1 / 3) / 2
  )
  assert qlora.summarize(small)[0]["of full"] is None


def test_bad_input_is_named(tmp_path):
  with pytest.raises(ValueError, match="unknown arm 'qlroa'; allowed: all, full, lora"):
    qlora.run(dataclasses.replace(TINY, arms="qlroa"), str(tmp_path))
