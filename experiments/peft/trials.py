"""Methods tried on a task: what they cost, and what they reach within some steps."""

import functools
import math
import statistics
from collections.abc import Iterator
from typing import Any

import jax
import optax

from effjax.core import trees
from effjax.core.typing import Params
from effjax.models import TransformerConfig
from effjax.train import TrainState, init_state, make_train_step
from effjax.train.objectives import Batch
from effjax.train.step import Step
from experiments.harness import Row
from experiments.lab.speed import ratio, timed
from experiments.lab.subject import Subject
from experiments.peft.methods import METHODS, Method
from experiments.peft.tasks import Task
from experiments.peft.tuning import account, adamw

BASELINE = "lora"
SWEPT = 1000  # the seed of sweeps, above any other
KEY = jax.random.key(0)  # of randomness in layers


class Trials:
  """Runs of a task.

  Attributes:
    task: what is learned.
    steps: of a run.
  """

  def __init__(self, task: Task, steps: int):
    self.task, self.steps = task, steps
    self._of_config = functools.cache(self._compiled)

  def as_it_is(self) -> Row:
    """The score without training."""
    return self.task.score(METHODS["full"], self.task.subject)

  def run(self, method: Method, rate: float, seed: int) -> Row:
    """The score after training, with the mean loss of the last half of the steps."""
    subject, losses, seconds = self.trained(method, rate, seed)
    late = losses[len(losses) // 2 :]
    return {
      "rate": rate,
      "seed": seed,
      "loss": statistics.mean(late),
      "step_ms": 1e3 * statistics.median(seconds[1:] or seconds),
      **self.task.score(method, subject),
    }

  def trained(
    self, method: Method, rate: float, seed: int, task: Task | None = None
  ) -> tuple[Subject, list[float], list[float]]:
    """The model after training; of each step the loss, and the seconds that it took.

    `task` gives other batches, of the same objective and model.
    """
    subject, state = self._start(method, rate, seed)
    batches = (task or self.task).batches(method, subject.params, seed)
    losses, seconds = [], []
    for _, batch in zip(range(self.steps), batches, strict=False):
      time, (state, loss) = timed(functools.partial(self._taken, subject.config, state, batch))
      losses.append(loss)
      seconds.append(time)
      if not math.isfinite(loss):
        break
    return Subject(subject.config, state.params), losses, seconds

  def keeps(self, method: Method) -> Row:
    """What trains: its numbers, their share of the model's, bytes with and without moments."""
    state = jax.eval_shape(lambda: self._start(method, method.rate, 0)[1])
    count, nbytes = trees.count(state.partition()[0]), account(state)
    return {
      "trained": count,
      "share": count / trees.count(self.task.subject.params),
      "trained_bytes": nbytes["trained"],
      "state_bytes": nbytes["trained"] + nbytes["optimiser"],
    }

  def takes(self, method: Method, turns: int) -> Row:
    """The time of a step, and as a ratio to LoRA's, the two in turns."""
    runners = {name: self._again(METHODS[name]) for name in dict.fromkeys([method.name, BASELINE])}
    for runner in runners.values():
      next(runner)  # compiles
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(turns):
      for name, runner in runners.items():
        times[name].append(next(runner))
    own, base = times[method.name], times[BASELINE]
    return {"step_ms": 1e3 * statistics.median(own), "step_ratio": ratio(own, base)}

  def _again(self, method: Method) -> Iterator[float]:
    """Seconds of a step, again and again on one batch."""
    subject, state = self._start(method, 0.0, 0)
    batch = next(self.task.batches(method, subject.params, 0))
    while True:
      seconds, (state, _) = timed(functools.partial(self._taken, subject.config, state, batch))
      yield seconds

  def _taken(
    self, config: TransformerConfig, state: TrainState, batch: Batch
  ) -> tuple[TrainState, float]:
    state, metrics = self._of_config(config)(state, batch, KEY)
    return state, float(metrics["loss"])

  def _start(self, method: Method, rate: float, seed: int) -> tuple[Subject, TrainState]:
    subject = method(self.task.subject, jax.random.key(seed))
    return subject, init_state(_copy(subject.params), self._rule(rate))

  def _compiled(self, config: TransformerConfig) -> Step:
    subject = Subject(config, self.task.subject.params)
    return make_train_step(self.task.objective(subject), self._rule(1.0))

  def _rule(self, rate: float) -> optax.GradientTransformation:
    """AdamW whose peak rate is part of its state, so that one program serves all rates."""
    scaled = lambda rate: optax.chain(adamw(1.0, self.steps), optax.scale(rate))
    return optax.inject_hyperparams(scaled)(rate=rate)


def _copy(params: Params) -> Any:
  """The same in arrays of its own, since a step consumes its state."""
  return jax.tree.map(jax.numpy.array, params)
