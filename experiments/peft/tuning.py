"""A model under fine-tuning: what trains, apart from what is frozen.

The state of a run holds what trains alone, and so do its checkpoints; the frozen part is held by
the objective. A step consumes its state and leaves the frozen part as it was.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from effjax import peft
from effjax.core import trees
from effjax.core.typing import Params, PyTree
from effjax.models import Transformer
from effjax.peft.adapter import is_adapter
from effjax.train import (
  OptimizerConfig,
  TrainState,
  init_state,
  make_optimizer,
  next_token,
  through,
)
from effjax.train.objectives import Batch, Objective
from effjax.train.step import Step
from experiments.lab.speed import timed
from experiments.lab.subject import Subject


@dataclasses.dataclass(frozen=True)
class Tuning:
  """A model that is to be trained.

  Attributes:
    module: of the model.
    frozen: the parameters without what adapts them; empty where all of them train.
    trained: path → adapter without its base, as `peft.detach` gives it, or all parameters.
  """

  module: Transformer
  frozen: Params
  trained: PyTree

  @classmethod
  def of(cls, subject: Subject) -> "Tuning":
    """The two parts of a model as a method made it."""
    adapted = any(map(is_adapter, trees.items(subject.params).values()))
    frozen, trained = peft.detach(subject.params) if adapted else ({}, subject.params)
    return cls(subject.module, frozen, trained)

  @property
  def view(self) -> Partial:
    """What trains → the parameters of the model."""
    return Partial(_whole, self.frozen)

  @property
  def objective(self) -> Objective:
    """Of what trains: next-token prediction."""
    return through(next_token(self.module), self.view)

  def start(self, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, of copies."""
    return init_state(jax.tree.map(jnp.copy, self.trained), optimizer)


def _whole(frozen: Params, trained: PyTree) -> Params:
  return peft.attach(frozen, trained) if frozen else trained


def adamw(rate: float, steps: int) -> optax.GradientTransformation:
  """AdamW that warms up for a tenth of the steps and falls to a tenth; nothing decays."""
  warmup = math.ceil(steps / 10)
  config = OptimizerConfig(learning_rate=rate, warmup=warmup, steps=steps, weight_decay=0.0)
  return make_optimizer(config)


class Evaluation:
  """Trained → nats a token of held-out text, all its tokens counting alike."""

  def __init__(self, tuning: Tuning, batches: Iterable[Batch]):
    self._batches, self._objective = list(batches), tuning.objective
    self._metrics = jax.jit(_metrics)

  def __call__(self, trained: PyTree) -> float:
    found = [self._metrics(self._objective, trained, batch) for batch in self._batches]
    pairs = [(float(m["nll"]), float(m["weight"])) for m in jax.device_get(found)]
    return math.fsum(nll * weight for nll, weight in pairs) / sum(weight for _, weight in pairs)


def _metrics(objective: Objective, trained: PyTree, batch: Batch) -> dict:
  return objective(trained, batch, None)[1]


class Timed:
  """A step that notes the seconds that each call takes."""

  def __init__(self, step: Step):
    self._step, self._seconds = step, []

  def __call__(self, *arguments: Any) -> Any:
    seconds, found = timed(lambda: jax.block_until_ready(self._step(*arguments)))
    self._seconds.append(seconds)
    return found

  @property
  def median(self) -> float | None:
    """Seconds of a step that compiled nothing, the median; None where there was none."""
    return statistics.median(self._seconds[1:]) if self._seconds[1:] else None


def account(tuning: Tuning, state: TrainState) -> dict[str, int]:
  """Bytes of the arrays: the frozen ones, those that train, and the optimiser's."""
  sizes = map(trees.nbytes, (tuning.frozen, state.params, state.opt_state))
  return dict(zip(("frozen", "trained", "optimiser"), sizes, strict=True))
