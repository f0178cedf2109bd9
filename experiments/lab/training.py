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
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
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
from effjax.train.step import After, Step

PER_CALL = 32  # steps of a call
PER_CHECKPOINT = 32  # calls between checkpoints
LOGGED = 12  # rows of metrics of a run, or some more


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
  *,
  after: After | None = None,
  watch: str | None = None,
) -> Params:
  """The parameters after training, all seeds at once; finished or interrupted runs go on.

  AdamW of `OptimizerConfig`, a tenth of the steps warming up, then a cosine to a tenth. `folder`
  keeps checkpoints and what `program` reports, every so many calls.

  Args:
    objective: what is minimised; the arrays that it holds have an axis of seeds too.
    params: parameters of all seeds, [seeds, …].
    orders: the batches of all steps.
    rates: the peak learning rate of each seed.
    seeds: seeds of the layers' randomness.
    folder: of this training alone.
    after, watch: see `program`.

  Raises:
    FloatingPointError: when the loss of every seed is not finite.
  """
  calls = len(orders)
  log_every = max(1, calls // LOGGED)
  config = LoopConfig(calls, checkpoint_every=PER_CHECKPOINT, log_every=log_every, keep=1)
  state = start(params, rates, orders.steps)
  step = program(objective, orders.steps, seeds, after=after, watch=watch)
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


def program(
  objective: Objective,
  steps: int,
  seeds: Sequence[int],
  *,
  after: After | None = None,
  watch: str | None = None,
) -> Step:
  """A call, a step of `fit`: it takes `count` steps of all seeds.

  The batch is what `Orders` gives. Metrics: "losses", the nll of each seed, "loss", their mean,
  "finite", whether any seed still learns, and what is watched, [seeds, …]; all but "finite" are
  means over the steps of the call.

  Args:
    objective: what is minimised.
    steps: those of the whole run.
    seeds: seeds of the layers' randomness.
    after: what ends a step of each seed, see `make_train_step`.
    watch: pattern of the objective's metrics that are reported; None is none.
  """
  layout = _layout(len(seeds))
  one = make_train_step(objective, _optimizer(1.0, steps), after=after)
  together = jax.vmap(one.program)
  kept = lambda name: name == "nll" or (watch is not None and re.search(watch, name))
  metrics_of = lambda found: {name: x for name, x in found.items() if kept(name)}

  def several(objective: Partial, states: PyTree, batches: Batch, count: Array, keys: Key):
    at = lambda i: jax.tree.map(lambda x: x[i], batches)

    def body(i: Array, carry: tuple[PyTree, dict[str, Array], Array]):
      states, total, finite = carry
      states, metrics = together(objective, states, at(i), keys)
      total = jax.tree.map(jnp.add, total, metrics_of(metrics))
      return states, total, finite & metrics["finite"]

    _, metrics = jax.eval_shape(together, objective, states, at(0), keys)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), metrics_of(metrics))
    return jax.lax.fori_loop(0, count, body, (states, nothing, jnp.ones(keys.shape, bool)))

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
    means = jax.tree.map(lambda x: x / count, total)
    found = _together(means | {"finite": finite}, layout.step)
    losses, finite = found.pop("nll"), found.pop("finite")
    state = dataclasses.replace(state, step=state.step + 1, extra=states)
    return state, {"loss": losses.mean(), "losses": losses, "finite": finite.any(), **found}

  outputs = (layout, layout.step)  # the layout of the inputs, or a second call compiles anew
  return Step(jax.jit(call, donate_argnums=1, out_shardings=outputs), one.objective)


def _together(tree: PyTree, everywhere: NamedSharding) -> PyTree:
  """Arrays [seeds, …] on every device, by one exchange.

  Of several exchanges at a time, each could wait for the other.
  """
  flat = jax.vmap(lambda tree: ravel_pytree(tree)[0])(tree)
  _, back = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), tree))
  return jax.vmap(back)(jax.lax.with_sharding_constraint(flat, everywhere))


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
