"""Seeds trained together: one program by `vmap`, its seeds laid over the devices there are.

Parameters, optimiser state and batches have a leading axis of seeds. Small matrices leave a CPU
idle that shares each of them among its cores, so a core is a device of its own, with seeds of its
own. A call of the program takes several steps, and is one step of `effjax.train.fit`, which keeps
checkpoints and resumes.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
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

PER_CALL = 32  # steps of a call
PER_CHECKPOINT = 32  # calls between checkpoints


class Orders:
  """Batches of every seed in its own order of the text, [steps, seeds, rows, tokens] a call.

  Seeds that are named more than once read alike.

  Attributes:
    steps: those of the whole run; of the last call only the first "count" are for use.
  """

  def __init__(
    self,
    loaders: Mapping[int, Loader],
    seeds: Sequence[int],
    steps: int,
    per_call: int | None = None,
  ):
    self.steps = steps
    self._loaders, self._places = dict(loaders), [list(loaders).index(seed) for seed in seeds]
    self._per_call, self._done = min(per_call or PER_CALL, steps), 0

  def __len__(self) -> int:
    return -(-self.steps // self._per_call)

  def __next__(self) -> dict[str, np.ndarray]:
    count = min(self._per_call, self.steps - self._done)
    self._done += count
    drawn = [[next(loader) for loader in self._loaders.values()] for _ in range(count)]
    drawn += drawn[-1:] * (self._per_call - count)
    steps = [jax.tree.map(lambda *x: np.stack(x), *seeds) for seeds in drawn]
    batches = jax.tree.map(lambda *x: np.stack(x)[:, self._places], *steps)
    return batches | {"count": np.array(count, np.int32)}

  def get_state(self) -> dict[str, Any]:
    return {"done": self._done, "loaders": [x.get_state() for x in self._loaders.values()]}

  def set_state(self, state: dict[str, Any]) -> None:
    self._done = state["done"]
    for loader, place in zip(self._loaders.values(), state["loaders"], strict=True):
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
  state = fit(step, state, orders, jax.random.key(0), workdir=folder, config=config)
  return jax.tree.map(jnp.asarray, jax.device_get(state.extra.params))


def use_every_core() -> None:
  """Makes each core of a CPU a device, unless the process has begun to compute."""
  with contextlib.suppress(RuntimeError):
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)


def start(params: Params, rates: Sequence[float], steps: int) -> TrainState:
  """The state before the first call: it carries those of all seeds, from copies of `params`."""
  init = lambda params, rate: init_state(params, _optimizer(rate, steps))
  states = jax.jit(jax.vmap(init))(jax.tree.map(jnp.copy, params), jnp.asarray(rates, jnp.float32))
  state = TrainState(jnp.zeros((), jnp.int32), None, None, extra=states)
  return jax.device_put(state, _layout(len(rates)))


def program(objective: Objective, steps: int, seeds: Sequence[int]) -> Step:
  """A call, a step of `fit`: it takes `count` steps of all seeds.

  The batch is what `Orders` gives. Metrics: "losses", the mean nll of each seed over the steps of
  the call, "loss", their mean, and "finite", whether any seed still learns.
  """
  layout, one = _layout(len(seeds)), make_train_step(objective, _optimizer(1.0, steps))
  together = jax.vmap(one.program)

  def several(objective: Partial, states: PyTree, batches: Batch, count: Array, keys: Key):
    def body(i: Array, carry: tuple[PyTree, Array, Array]):
      states, total, finite = carry
      each = jax.tree.map(lambda x: x[i], batches)
      states, metrics = together(objective, states, each, keys)
      return states, total + metrics["nll"], finite & metrics["finite"]

    nothing = (jnp.zeros(keys.shape, jnp.float32), jnp.ones(keys.shape, bool))
    return jax.lax.fori_loop(0, count, body, (states, *nothing))

  each = P("seeds")
  on_devices = jax.shard_map(
    several,
    mesh=layout.step.mesh,
    in_specs=(each, each, P(None, "seeds"), P(), each),
    out_specs=each,
    check_vma=False,
  )

  def call(objective: Partial, state: TrainState, batch: Batch, rng: Key):
    keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.asarray(seeds))
    batches, count = {**batch}, jnp.asarray(batch["count"])
    del batches["count"]
    states, total, finite = on_devices(objective, state.extra, batches, count, keys)
    # Brought together at once: of several exchanges at a time, each could wait for the other.
    both = jax.lax.with_sharding_constraint(jnp.stack([total / count, finite]), layout.step)
    losses, finite = both
    state = dataclasses.replace(state, step=state.step + 1, extra=states)
    return state, {"loss": losses.mean(), "losses": losses, "finite": finite.any()}

  outputs = (layout, layout.step)  # the layout of the inputs, or a second call compiles anew
  return Step(jax.jit(call, donate_argnums=1, out_shardings=outputs), one.objective)


def _layout(seeds: int) -> TrainState:
  """Shardings of the state that carries those of all seeds."""
  mesh = _mesh(seeds)
  everywhere, apart = (NamedSharding(mesh, spec) for spec in (P(), P("seeds")))
  return TrainState(everywhere, None, None, extra=apart)


def _mesh(seeds: int) -> Mesh:
  """As many devices as divide the seeds."""
  devices = jax.devices()
  count = max(n for n in range(1, len(devices) + 1) if seeds % n == 0)
  return Mesh(np.array(devices[:count]), ("seeds",))


def _optimizer(rate: float | Array, steps: int) -> optax.GradientTransformation:
  """AdamW whose peak learning rate is part of its state, so that each seed may have its own."""
  shape = OptimizerConfig(learning_rate=1.0, warmup=math.ceil(steps / 10), steps=steps)
  scaled = lambda rate: optax.chain(make_optimizer(shape), optax.scale(rate))
  return optax.inject_hyperparams(scaled)(rate=rate)
