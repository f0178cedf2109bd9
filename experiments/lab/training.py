"""Seeds trained together: one program by `vmap`, so that small matrices fill the processor.

Parameters, optimiser state and batches have a leading axis of seeds. A call of the program takes
several steps, and is one step of `effjax.train.fit`, which keeps checkpoints and resumes.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from effjax.core.typing import Array, Key, Params, PyTree
from effjax.data import Loader
from effjax.train import (
  LoopConfig,
  OptimizerConfig,
  TrainState,
  fit,
  init_state,
  make_optimizer,
  make_train_step,
)
from effjax.train.objectives import Batch, Objective
from effjax.train.step import Step

PER_CALL = 16  # steps of a call
PER_CHECKPOINT = 32  # calls between checkpoints


class Orders:
  """Batches of every seed in its own order of the text, [calls, seeds, rows, tokens] a time.

  Attributes:
    steps: those of the whole run; the last call may have fewer than the others, see "count".
  """

  def __init__(self, loaders: Sequence[Loader], steps: int, per_call: int | None = None):
    self.steps = steps
    self._loaders, self._per_call, self._done = list(loaders), min(per_call or PER_CALL, steps), 0

  def __len__(self) -> int:
    return -(-self.steps // self._per_call)

  def __next__(self) -> dict[str, Any]:
    count = min(self._per_call, self.steps - self._done)
    self._done += count
    drawn = [[next(loader) for loader in self._loaders] for _ in range(count)]
    drawn += drawn[-1:] * (self._per_call - count)
    rows = [jax.tree.map(lambda *x: np.stack(x), *seeds) for seeds in drawn]
    return {"batches": jax.tree.map(lambda *x: np.stack(x), *rows), "count": np.int32(count)}

  def get_state(self) -> dict[str, Any]:
    return {"done": self._done, "loaders": [loader.get_state() for loader in self._loaders]}

  def set_state(self, state: dict[str, Any]) -> None:
    self._done = state["done"]
    for loader, place in zip(self._loaders, state["loaders"], strict=True):
      loader.set_state(place)


def train(
  objective: Objective,
  params: Params,
  orders: Orders,
  rates: Sequence[float],
  seeds: Sequence[int],
  folder: Path,
) -> Params:
  """The parameters after training, all seeds at once; finished or interrupted runs go on.

  AdamW of `OptimizerConfig`, a tenth of the steps warming up, then a cosine to a tenth. `folder`
  keeps checkpoints and the losses of every call, "losses" a seed.

  Args:
    objective: what is minimised; the arrays that it holds have an axis of seeds too.
    params: parameters of all seeds, [seeds, …].
    orders: the batches of all steps.
    rates: the peak learning rate of each seed.
    seeds: seeds of the layers' randomness.
    folder: of this training alone.

  Raises:
    FloatingPointError: when the loss of every seed is not finite.
  """
  config = LoopConfig(steps=len(orders), checkpoint_every=PER_CHECKPOINT, log_every=8, keep=1)
  state, step = start(params, rates, orders.steps), program(objective, orders.steps, seeds)
  return fit(step, state, orders, jax.random.key(0), workdir=folder, config=config).extra.params


def start(params: Params, rates: Sequence[float], steps: int) -> TrainState:
  """The state before the first call: it carries those of all seeds, from copies of `params`."""
  init = lambda params, rate: init_state(params, _optimizer(rate, steps))
  states = jax.jit(jax.vmap(init))(jax.tree.map(jnp.copy, params), jnp.asarray(rates, jnp.float32))
  return TrainState(jnp.zeros((), jnp.int32), None, None, extra=states)


def program(objective: Objective, steps: int, seeds: Sequence[int]) -> Step:
  """A call, a step of `fit`: it takes `count` steps of all seeds.

  The batch is what `Orders` gives. Metrics: "losses", the mean nll of each seed over the steps of
  the call, "loss", their mean, and "finite", whether any seed still learns.
  """
  one = make_train_step(objective, _optimizer(1.0, steps))
  together = jax.vmap(one.program)

  def call(objective: Partial, state: TrainState, batch: Batch, rng: Key):
    keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.asarray(seeds))

    def body(i: Array, carry: tuple[PyTree, Array, Array]):
      states, total, finite = carry
      each = jax.tree.map(lambda x: x[i], batch["batches"])
      states, metrics = together(objective, states, each, keys)
      return states, total + metrics["nll"], finite & metrics["finite"]

    nothing = (jnp.zeros(len(seeds), jnp.float32), jnp.ones(len(seeds), bool))
    carry = (state.extra, *nothing)
    states, total, finite = jax.lax.fori_loop(0, batch["count"], body, carry)
    losses = total / batch["count"]
    state = dataclasses.replace(state, step=state.step + 1, extra=states)
    return state, {"loss": losses.mean(), "losses": losses, "finite": finite.any()}

  return Step(jax.jit(call, donate_argnums=1), one.objective)


def _optimizer(rate: float | Array, steps: int) -> optax.GradientTransformation:
  """AdamW whose peak learning rate is part of its state, so that each seed may have its own."""
  shape = OptimizerConfig(learning_rate=1.0, warmup=math.ceil(steps / 10), steps=steps)
  scaled = lambda rate: optax.chain(make_optimizer(shape), optax.scale(rate))
  return optax.inject_hyperparams(scaled)(rate=rate)
