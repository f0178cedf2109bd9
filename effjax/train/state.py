"""What training carries from step to step."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from effjax.core import trees
from effjax.core.typing import Params, PyTree
from effjax.train.masters import master_copies


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Steps taken, parameters, the optimiser's state of those that train, and whatever else.

  Attributes:
    step: int32 scalar.
    params: all parameters, trained or not.
    opt_state: state of the optimiser for the trained ones; other places hold no arrays.
    extra: arrays of any form that `make_train_step(…, after=)` carries along, such as multipliers,
      a loss scale or a schedule's place; objectives read them.
    trains: paths of the arrays that train; None is what `trees.trained` says.
  """

  step: PyTree
  params: PyTree
  opt_state: PyTree
  extra: PyTree = None
  trains: frozenset[str] | None = dataclasses.field(default=None, metadata={"static": True})

  def __repr__(self) -> str:
    arrays = f"{len(jax.tree.leaves(self.params))} arrays of parameters"
    training = "" if self.trains is None else f", {len(self.trains)} of them train"
    return f"TrainState(step {self.step}, {arrays}{training})"

  def partition(self) -> tuple[PyTree, PyTree]:
    """`params` as (those that train, the rest), None elsewhere, as `trees.partition` gives them."""
    return _partition(
      self.params, trees.trained(self.params) if self.trains is None else self.trains
    )


def trained(params: Params, trainable: trees.Chooser | None = None) -> tuple[PyTree, PyTree]:
  """`params` as (those that train, the rest), None elsewhere, as `trees.partition` gives them.

  `trainable` is a pattern or predicate of `core.trees`; None is what `trees.trained` says.

  Raises:
    ValueError: when nothing is chosen, or an array of integers is.
  """
  if trainable is None:
    paths = trees.trained(params)
    if not paths:
      raise ValueError("params: nothing in it trains; allowed: arrays of floats, or adapters")
    return _partition(params, paths)
  chosen, rest = trees.partition(params, trainable)
  for path, x in jax.tree_util.tree_leaves_with_path(chosen):
    if not jnp.issubdtype(x.dtype, jnp.inexact):
      raise ValueError(
        f"trainable={trainable!r} chooses {trees.path_string(path)}, which holds integers"
      )
  return chosen, rest


def init_state(
  params: Params,
  optimizer: optax.GradientTransformation,
  *,
  trainable: trees.Chooser | None = None,
  extra: PyTree = None,
) -> TrainState:
  """The state before the first step. What trains is chosen here and nowhere else.

  Args:
    params: all parameters.
    optimizer: sees those that train, in float32 where they are coarser, see `master_copies`.
    trainable: a pattern or predicate of `core.trees`; None is what the parameters themselves say:
      where there are adapters those alone, else every array of floats but for quantised weights.
    extra: what the state carries besides, see `TrainState`.

  Raises:
    ValueError: when nothing is chosen, or an array of integers is.

  Example:
    >>> state = init_state({"a": jnp.ones(2), "b": jnp.ones(2)}, optax.adam(0.1), trainable="a")
    >>> state.opt_state[0].mu
    {'a': Array([0., 0.], dtype=float32), 'b': None}
  """
  chosen, _ = trained(params, trainable)
  leaves = jax.tree_util.tree_leaves_with_path(chosen)
  paths = frozenset(trees.path_string(path) for path, _ in leaves)
  opt_state = master_copies(optimizer).init(chosen)
  return TrainState(jnp.zeros((), jnp.int32), params, opt_state, extra, paths)


def _partition(params: Params, paths: frozenset[str]) -> tuple[PyTree, PyTree]:
  return trees.partition(params, lambda path, _: path in paths)
