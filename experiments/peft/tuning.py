"""What runs of fine-tuning share: the optimiser, what is kept and paid, how long a step takes."""

import math
import statistics
from collections.abc import Iterable
from typing import Any

import jax
import optax

from effjax.core import trees
from effjax.core.typing import Params
from effjax.models import Transformer
from effjax.train import OptimizerConfig, TrainState, make_optimizer, next_token
from effjax.train.objectives import Batch
from effjax.train.step import Step
from experiments.lab.speed import timed

PARTS = ("frozen", "trained", "optimiser")


def adamw(rate: float, steps: int) -> optax.GradientTransformation:
  """AdamW that warms up for a tenth of the steps and falls to a tenth; nothing decays."""
  warmup = math.ceil(steps / 10)
  config = OptimizerConfig(learning_rate=rate, warmup=warmup, steps=steps, weight_decay=0.0)
  return make_optimizer(config)


def account(state: TrainState) -> dict[str, int]:
  """Bytes of the arrays: of parameters that are frozen, of those that train, of the optimiser.

  Example:
    >>> import jax.numpy as jnp
    >>> from effjax.train import init_state
    >>> params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(5)}
    >>> account(init_state(params, optax.trace(0.9), trainable="b"))
    {'frozen': 6, 'trained': 20, 'optimiser': 20}
  """
  trained, frozen = state.partition()
  sizes = map(trees.nbytes, (frozen, trained, state.opt_state))
  return dict(zip(PARTS, sizes, strict=True))


class Evaluation:
  """params → nats a token of held-out text, all its tokens counting alike."""

  def __init__(self, module: Transformer, batches: Iterable[Batch]):
    self._batches, objective = list(batches), next_token(module)
    self._metrics = jax.jit(lambda params, batch: objective(params, batch, None)[1])

  def __call__(self, params: Params) -> float:
    found = jax.device_get([self._metrics(params, batch) for batch in self._batches])
    pairs = [(float(m["nll"]), float(m["weight"])) for m in found]
    return math.fsum(nll * weight for nll, weight in pairs) / sum(weight for _, weight in pairs)


class Timed:
  """A step that notes the seconds that each call takes."""

  def __init__(self, step: Step):
    self._step = step
    self._seconds: list[float] = []

  def __call__(self, *arguments: Any) -> Any:
    seconds, found = timed(lambda: jax.block_until_ready(self._step(*arguments)))
    self._seconds.append(seconds)
    return found

  @property
  def median(self) -> float | None:
    """Seconds of a step that compiled nothing, the median; None where there was none."""
    return statistics.median(self._seconds[1:]) if self._seconds[1:] else None
