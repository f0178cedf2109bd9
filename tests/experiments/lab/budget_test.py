"""The arithmetic of budgets, by hand."""

import dataclasses

import pytest

from effjax import cost
from effjax.models import presets
from experiments.lab import budget
from experiments.lab.budget import Budget, Spending
from experiments.lab.sizes import LADDER, Rung, parameters

RUNG = Rung("tiny", 8, 2, 2, batch=2, learning_rate=1e-3, vocab=16, length=4)
# A table [16, 8]; a layer of 4 · 8 · 8 in attention, 3 · 8 · 32 in the MLP and two norms; a norm.
LAYER = 4 * 8 * 8 + 3 * 8 * 32 + 2 * 8
DENSE = 16 * 8 + 2 * LAYER + 8
# Two FLOPs for each of the matrices' numbers, and the scores and their sums over 2.5 keys a token.
FORWARD = 2 * (16 * 8 + 2 * (4 * 8 * 8 + 3 * 8 * 32)) + 2 * 2 * 2 * 8 * 2.5


def test_tokens_and_flops_are_those_of_the_dense_model():
  spent = Budget(RUNG, 20.0)
  assert parameters(RUNG.config()) == DENSE
  assert cost.flops(RUNG.config(), 4) == FORWARD
  assert spent.tokens == 20 * DENSE
  assert spent.flops == pytest.approx(3 * FORWARD * 20 * DENSE)
  assert spent.steps(RUNG.config(), Spending()) == round(20 * DENSE / 8)


@pytest.mark.parametrize(
  ("spending", "factor"),
  [
    (Spending(spent=0.5), 0.5),
    (Spending(passes=2.0), 1.5),
    (Spending(extra_flops=FORWARD), 3 / 4),
    (Spending(spent=0.25, passes=2.0, extra_flops=FORWARD), 3 / 4),
    (Spending(equal="tokens", passes=2.0), 1.0),
    (Spending(equal="parameters", spent=0.5), 0.5),
  ],
)
def test_what_costs_more_takes_fewer_steps(spending, factor):
  assert Budget(RUNG, 20.0).steps(RUNG.config(), spending) == round(20 * DENSE / 8 * factor)


def test_at_equal_flops_a_smaller_model_reads_more():
  half = RUNG.config(layers=1)
  spent = Budget(RUNG, 20.0)
  steps = spent.steps(half, Spending())
  assert 3 * cost.flops(half, 4) * 8 * steps == pytest.approx(spent.flops, rel=0.002)
  assert spent.steps(half, Spending(equal="tokens")) == round(20 * DENSE / 8)


def test_equal_parameters_are_asked_for():
  with pytest.raises(ValueError, match=r"equal='parameters': the model has .* to 1 %"):
    Budget(RUNG, 20.0).steps(RUNG.config(layers=1), Spending(equal="parameters"))


@pytest.mark.parametrize(
  ("make", "said"),
  [
    (lambda: Spending(equal="seconds"), "equal='seconds'; allowed: flops, tokens, parameters"),
    (lambda: Spending(spent=1.0), "spent=1.0; allowed: from 0, below 1"),
    (lambda: Budget(RUNG, 0.0), "tokens_per_parameter=0.0; allowed: above 0"),
    (
      lambda: budget.largest(30, tokens_per_parameter=20, minutes=0.1),
      "minutes=0.1; allowed: from",
    ),
  ],
)
def test_what_cannot_be_spent_is_refused(make, said):
  with pytest.raises(ValueError, match=said):
    make()


def test_the_largest_rung_that_ends_in_time():
  work = [9 * Budget(rung, 20.0).flops / budget.SPEED / 60 for rung in LADDER]
  assert work == sorted(work)
  for rung, minutes in zip(LADDER, work, strict=True):
    assert budget.largest(9, tokens_per_parameter=20.0, minutes=minutes * 1.001) is rung


def test_the_ladder_climbs_from_a_tenth_to_three_million():
  sizes = [parameters(rung.config()) - rung.vocab * rung.width for rung in LADDER]
  assert sizes == sorted(sizes)
  for rung, size in zip(LADDER, sizes, strict=True):
    assert rung.name == f"{size / 1e6:.1f}M"
    assert dataclasses.replace(rung.config(2), layers=()) == dataclasses.replace(
      presets.llama(1024, rung.width, 1, rung.heads, context=rung.length), layers=()
    )


def test_a_title_says_the_fraction():
  assert "1/40 of the 20 that a verdict wants" in budget.title(LADDER[0], 0.5, 3)
  assert "verdict" not in budget.title(LADDER[0], 20.0, 3)
