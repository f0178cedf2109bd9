"""One jitted training step for every objective and every placement."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core as jex
from jax.tree_util import Partial

from effjax.core import trees
from effjax.core.known import number
from effjax.core.numerics import wide
from effjax.core.typing import Array, Key, PyTree, Size
from effjax.parallel.placement import Anywhere, Placement
from effjax.train.masters import master_copies
from effjax.train.objectives import Batch, Objective
from effjax.train.state import TrainState

After = Callable[[TrainState, dict[str, Array]], TrainState]


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled step(state, batch, rng) -> (state, metrics).

  Arrays that the objective holds, such as a teacher's parameters in a `Partial`, are arguments of
  the program and not constants in it.

  Attributes:
    program: the jitted function (objective, state, batch, rng).
    objective: its first argument.
  """

  program: Any
  objective: Partial

  def __repr__(self) -> str:
    held = sum(x.size for x in jax.tree.leaves(self.objective))
    return f"Step(state, batch, rng) → (state, metrics), its objective holding {held:,} numbers"

  def __call__(
    self, state: TrainState, batch: Batch, rng: Key
  ) -> tuple[TrainState, dict[str, Array]]:
    return self.program(self.objective, state, batch, rng)

  def lower(
    self, state: TrainState, batch: Batch | Mapping[str, jax.ShapeDtypeStruct], rng: Key
  ) -> jax.stages.Lowered:
    """The program for these arguments, or their shapes, to be compiled or looked at."""
    return self.program.lower(self.objective, state, batch, rng)

  def trace(
    self, state: TrainState, batch: Batch | Mapping[str, jax.ShapeDtypeStruct], rng: Key
  ) -> jex.ClosedJaxpr:
    """The program for these arguments, or their shapes, before it is lowered."""
    return self.program.trace(self.objective, state, batch, rng).jaxpr


def make_train_step(
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  microbatches: Size = 1,
  placement: Placement | None = None,
  after: After | None = None,
) -> Step:
  """A jitted step(state, batch, rng) -> (state, metrics); it consumes the state it is given.

  Consumed are all arrays of the state, those that do not train too: of parameters that are needed
  afterwards, start from a copy.

  The batch is cut into `microbatches` that are gone through in turn; loss and gradients are
  Σ w_i g_i / Σ w_i with the objective's weights, those of the whole batch. The step draws its
  randomness from `rng` and its number, so the same `rng` serves every step. When the loss or the
  norm of the gradients is not finite, the state stays as it was and `metrics["finite"]` is False.
  What gets gradients and optimiser state is the state's affair, see `init_state`.

  Args:
    objective: (params, batch, rng) -> (loss, metrics), or (params, batch, rng, extra) where the
      state has something `extra`.
    optimizer: an optax transformation; clipping belongs to it.
    microbatches: a divisor of the batch.
    placement: where arrays live on a mesh; None leaves that to the arrays given.
    after: (state, metrics) -> state, the last thing inside the step, finite or not: what is carried
      between steps by other rules than the optimiser's, in `extra` or in parameters.

  Raises:
    ValueError: at the first call, when `microbatches` does not divide the batch.

  Example:
    >>> from effjax.train.state import init_state
    >>> objective = lambda params, batch, rng: ((params["w"] - batch["x"].mean()) ** 2, {})
    >>> state = init_state({"w": jnp.zeros(())}, optax.sgd(0.5))
    >>> step = make_train_step(objective, optax.sgd(0.5))
    >>> state, metrics = step(state, {"x": jnp.ones(4)}, jax.random.key(0))
    >>> float(state.params["w"]), float(metrics["loss"])
    (1.0, 1.0)
  """
  microbatches = number("microbatches", microbatches, integer=True, least=1)
  place, optimizer = placement or Anywhere(), master_copies(optimizer)

  def step(objective: Objective, state: TrainState, batch: Batch, rng: Key):
    chosen, rest = state.partition()
    extra = () if state.extra is None else (state.extra,)

    def compute(part: Batch, key: Key):
      part = place.on_batch(part)
      loss = lambda chosen: objective(place.on_params(trees.merge(chosen, rest)), part, key, *extra)
      with place.scope():
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(chosen)
      return place.on_gradients(grads), {**metrics, "loss": value}

    key = jax.random.fold_in(rng, state.step)
    grads, metrics = _accumulate(compute, _split(batch, microbatches), key)
    norm = optax.tree.norm(jax.tree.map(lambda x: x.astype(wide(x.dtype)), grads))
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    metrics = {**metrics, "grad_norm": norm, "finite": finite}
    updates, opt_state = optimizer.update(grads, state.opt_state, chosen)
    params = trees.merge(optax.apply_updates(chosen, updates), rest)
    new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    return place.on_state(new if after is None else after(new, metrics)), metrics

  held = objective if isinstance(objective, Partial) else Partial(objective)
  return Step(jax.jit(step, donate_argnums=1), held)


def _split(batch: Batch, parts: int) -> Batch:
  """[B, …] → [parts, B / parts, …]; part i has rows i, i + parts, …, so a sharded B stays so."""

  def cut(x: Array) -> Array:
    if x.shape[0] % parts:
      raise ValueError(f"microbatches={parts} does not divide the batch of {x.shape[0]}")
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

  return jax.tree.map(cut, batch)


def _accumulate(compute, parts: Batch, key: Key) -> tuple[PyTree, dict[str, Array]]:
  """Gradients and metrics averaged over `parts` by "weight", which itself is summed.

  The mean runs along, so that weights of any size are good; while all are 0, parts count alike.
  """
  count = jax.tree.leaves(parts)[0].shape[0]
  if count == 1:
    return compute(jax.tree.map(lambda x: x[0], parts), key)

  def add(carry, inputs):
    (mean, total), (part, key, place) = carry, inputs
    grads, metrics = compute(part, key)
    weight = jnp.asarray(metrics.get("weight", 1.0), jnp.float32)
    total = total + weight
    share = jnp.where(total == 0, 1 / place, weight / jnp.where(total == 0, 1, total))
    mean = jax.tree.map(functools.partial(_moved, share), mean, (grads, metrics))
    return (mean, total), None

  inputs = (parts, jax.random.split(key, count), jnp.arange(1.0, count + 1))
  first = jax.eval_shape(
    lambda part, key, _: compute(part, key), *jax.tree.map(lambda x: x[0], inputs)
  )
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), first)
  ((grads, metrics), weight), _ = jax.lax.scan(add, (zeros, jnp.float32(0)), inputs)
  grads = jax.tree.map(lambda x, like: x.astype(like.dtype), grads, first[0])
  return grads, {**metrics, **({"weight": weight} if "weight" in metrics else {})}


def _moved(share: Array, mean: Array, x: Array) -> Array:
  """mean + share · (x − mean), where what has a share of 0 is not read."""
  x = x.astype(jnp.float32)
  part = lambda share, x: jnp.where(share != 0, share * x, 0)
  return part(1 - share, mean) + part(share, x)
