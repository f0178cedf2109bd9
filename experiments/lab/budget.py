"""What a study spends: tokens a parameter, and the FLOPs, tokens or parameters that runs share.

Tokens are counted a parameter of the dense baseline, the token table's included, as Hoffmann et al.
count them (arXiv 2203.15556, twenty being compute-optimal; that they do, arXiv 2406.12907 shows). A
step of plain training costs three forward passes a token (forward, and twice that backward, Kaplan
et al., arXiv 2001.08361, section 2.1); where only factors beside frozen matrices train the backward
pass to the matrices falls away and two remain; a teacher costs one of its own.
"""

import dataclasses
from collections.abc import Sequence

from effjax import cost
from effjax.models import TransformerConfig
from experiments.lab.sizes import LADDER, Rung, parameters

COMPUTE_OPTIMAL = 20.0
SPEED = 60e9  # FLOPs a second of two cores that train seeds together, see `scripts/bench seeds`
EQUAL = ("flops", "tokens", "parameters")


@dataclasses.dataclass(frozen=True)
class Spending:
  """How a run uses the budget.

  Attributes:
    equal: what it has in common with the dense baseline: "flops" of training; "tokens"; or
      "parameters", to 1 %, and then tokens too.
    spent: the part of the budget that its start has taken.
    passes: forward passes that a token of training costs.
    extra_flops: FLOPs a token besides, such as a teacher's.
  """

  equal: str = "flops"
  spent: float = 0.0
  passes: float = 3.0
  extra_flops: float = 0.0

  def __post_init__(self):
    if self.equal not in EQUAL:
      raise ValueError(f"equal={self.equal!r}; allowed: {', '.join(EQUAL)}")
    if not 0 <= self.spent < 1:
      raise ValueError(f"spent={self.spent}; allowed: from 0, below 1")


@dataclasses.dataclass(frozen=True)
class Budget:
  """The budget of the dense model of a rung.

  Attributes:
    rung: size and batch.
    tokens_per_parameter: of the dense baseline.

  Example:
    >>> from experiments.lab.sizes import LADDER
    >>> budget = Budget(LADDER[1], 20.0)
    >>> budget.tokens == 20 * parameters(LADDER[1].config())
    True
  """

  rung: Rung
  tokens_per_parameter: float

  def __post_init__(self):
    if not self.tokens_per_parameter > 0:
      raise ValueError(f"tokens_per_parameter={self.tokens_per_parameter}; allowed: above 0")

  @property
  def tokens(self) -> float:
    """Tokens that the dense baseline reads."""
    return self.tokens_per_parameter * parameters(self.rung.config())

  @property
  def flops(self) -> float:
    """FLOPs that training the dense baseline takes."""
    return 3.0 * cost.flops(self.rung.config(), self.rung.length) * self.tokens

  def steps(self, config: TransformerConfig, spending: Spending) -> int:
    """Steps of a run that use what is left of the budget, at least one.

    Raises:
      ValueError: for a model that was to have the baseline's parameters and has not.
    """
    left = 1 - spending.spent
    if spending.equal == "flops":
      forward = cost.flops(config, self.rung.length)
      tokens = left * self.flops / (spending.passes * forward + spending.extra_flops)
    else:
      tokens = left * self.tokens
    if spending.equal == "parameters":
      self._check_parameters(config)
    return max(1, round(tokens / (self.rung.batch * self.rung.length)))

  def _check_parameters(self, config: TransformerConfig) -> None:
    ours, theirs = parameters(config), parameters(self.rung.config())
    if abs(ours / theirs - 1) > 0.01:
      raise ValueError(
        f"equal='parameters': the model has {ours:,}; allowed: {theirs:,} as the dense one, to 1 %"
      )


def largest(
  runs: int, *, tokens_per_parameter: float, minutes: float, ladder: Sequence[Rung] = LADDER
) -> Rung:
  """The largest rung of which `runs` runs, each of a whole budget, end in time on two cores.

  Args:
    runs: techniques times seeds.
    tokens_per_parameter: of the dense baseline.
    minutes: for all of them together, at `SPEED`.
    ladder: from the smallest to the largest.

  Raises:
    ValueError: when there is no such rung.

  Example:
    >>> largest(3, tokens_per_parameter=0.1, minutes=60.0).name
    '2.7M'
  """
  needs = lambda rung: runs * Budget(rung, tokens_per_parameter).flops / SPEED / 60
  fitting = [rung for rung in ladder if needs(rung) <= minutes]
  if not fitting:
    raise ValueError(
      f"minutes={minutes:g}; allowed: from {needs(ladder[0]):.1f} for {runs} runs of "
      f"{tokens_per_parameter:g} tokens a parameter"
    )
  return fitting[-1]


def title(rung: Rung, tokens_per_parameter: float, seeds: int) -> str:
  """What trained rows were given, for the top of their table.

  Example:
    >>> title(LADDER[1], 0.5, 3)
    'Trained: 0.2M parameters beside the token table, 0.5 tokens a parameter (1/40 of the 20 that
     a verdict wants; 0.14 M for the dense model), 3 seeds'
  """
  part = COMPUTE_OPTIMAL / tokens_per_parameter
  share = "" if part <= 1 else f"1/{part:g} of the {COMPUTE_OPTIMAL:g} that a verdict wants; "
  millions = Budget(rung, tokens_per_parameter).tokens / 1e6
  return (
    f"Trained: {rung.name} parameters beside the token table, {tokens_per_parameter:g} tokens a "
    f"parameter ({share}{millions:.2f} M for the dense model), {seeds} seeds"
  )
