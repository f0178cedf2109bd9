"""What training carries from step to step."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from effjax.core import trees
from effjax.core.typing import Params, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Steps taken, parameters, and the optimiser's state of those that train.

  Attributes:
    step: int32 scalar.
    params: all parameters, trained or not.
    opt_state: state of the optimiser for the trained ones; other places hold no arrays.
  """

  step: PyTree
  params: PyTree
  opt_state: PyTree


def trained(params: Params, trainable: trees.Chooser | None = None) -> tuple[PyTree, PyTree]:
  """`params` as (those that train, the rest), None elsewhere, as `trees.partition` gives them.

  `trainable` is a pattern or predicate of `core.trees`; None takes every array of floats, which
  leaves out the integer codes of quantised weights.

  Raises:
    ValueError: when nothing is chosen, or an array of integers is.
  """
  chosen, rest = trees.partition(params, _is_float if trainable is None else trainable)
  for path, leaf in trees.items(chosen).items():
    if any(not _is_float(path, x) for x in jax.tree.leaves(leaf)):
      raise ValueError(f"trainable={trainable!r} chooses {path}, which holds integers")
  return chosen, rest


def init_state(
  params: Params,
  optimizer: optax.GradientTransformation,
  *,
  trainable: trees.Chooser | None = None,
) -> TrainState:
  """The state before the first step.

  Raises:
    ValueError: as `trained`.

  Example:
    >>> state = init_state({"a": jnp.ones(2), "b": jnp.ones(2)}, optax.adam(0.1), trainable="a")
    >>> state.opt_state[0].mu
    {'a': Array([0., 0.], dtype=float32), 'b': None}
  """
  chosen, _ = trained(params, trainable)
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(chosen))


def _is_float(path: str, leaf) -> bool:
  return jnp.issubdtype(leaf.dtype, jnp.inexact)
