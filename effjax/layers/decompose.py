"""A feed-forward layer as a sum over its hidden units, in any groups.

FFN(x) = Σ_h act(x W_up[:, h] + b_h) W_down[h, :] + b_down, and, gated, with the gate's column h in
each term: units do not know one another, so any of them can be taken out (pruning) or kept
together (experts). "Are Sixteen Heads Really Better than One?" (arXiv 1905.10650) does so with the
heads of attention, MoEfication (arXiv 2110.01786, section 3.1) with these.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from effjax.core.typing import Params
from effjax.core.weights import materialize
from effjax.layers.mlp import MLP

Groups = Sequence[Sequence[int]]


def select_neurons(module: MLP, params: Params, neurons: Sequence[int]) -> tuple[MLP, dict]:
  """The `MLP` of the hidden units `neurons` alone, in ascending order, with the output's bias.

  Args:
    module: the layer.
    params: its parameters, with any leading axes (scanned layers). A `Weight` is multiplied out.
    neurons: distinct indices 0 … F − 1.

  Raises:
    ValueError: when there is no such unit, one comes twice, there are none, or the parameters are
      not those of an `MLP`.

  Example:
    >>> params = {"up": {"kernel": jnp.ones((4, 6))}, "down": {"kernel": jnp.ones((6, 4))}}
    >>> module, params = select_neurons(MLP(6), params, [0, 3, 5])
    >>> module.width, params["up"]["kernel"].shape, params["down"]["kernel"].shape
    (3, (4, 3), (3, 4))
  """
  if not {"up", "down"} <= set(params) <= {"up", "gate", "down"}:
    raise ValueError(f"params has {sorted(params)}; allowed: up, down, perhaps gate")
  index = check_indices("neurons", neurons, module.width)
  inner = {name: select_outputs(params[name], index) for name in params if name != "down"}
  return module.clone(width=len(index)), {**inner, "down": select_inputs(params["down"], index)}


def split_neurons(module: MLP, params: Params, groups: Groups) -> list[tuple[MLP, dict]]:
  """One `MLP` for each group of hidden units; the sum of their outputs is the layer's.

  The first part keeps the output's bias, and that of the others is zero.

  Args:
    module, params: as in `select_neurons`.
    groups: a partition of 0 … F − 1.

  Raises:
    ValueError: when `groups` is not a partition, or as in `select_neurons`.

  Example:
    >>> params = {"up": {"kernel": jnp.ones((2, 3))}, "down": {"kernel": jnp.ones((3, 2))}}
    >>> parts = split_neurons(MLP(3, "relu"), params, [[0, 2], [1]])
    >>> [part.apply({"params": p}, jnp.ones((1, 1, 2))).tolist() for part, p in parts]
    [[[[4.0, 4.0]]], [[[2.0, 2.0]]]]
  """
  check_partition(groups, module.width)
  parts = [select_neurons(module, params, group) for group in groups]
  return bias_once(parts, "down")


def select_outputs(linear: Params, index: np.ndarray) -> dict:
  """The parameters of a `Linear` with the columns `index` of its output only."""
  return {name: jnp.take(materialize(x), index, axis=-1) for name, x in linear.items()}


def select_inputs(linear: Params, index: np.ndarray) -> dict:
  """The parameters of a `Linear` that reads the columns `index` of its input only."""
  return {**linear, "kernel": jnp.take(materialize(linear["kernel"]), index, axis=-2)}


def bias_once(parts: list, name: str) -> list:
  """`parts`, pairs of module and parameters, with zero for the bias of `name` but in the first."""
  zero = lambda tree: {k: jnp.zeros_like(x) if k == "bias" else x for k, x in tree.items()}
  return parts[:1] + [(part, {**tree, name: zero(tree[name])}) for part, tree in parts[1:]]


def check_indices(name: str, given: Sequence[int], count: int) -> np.ndarray:
  """`given` in ascending order; raises ValueError unless they are distinct and 0 … count − 1."""
  index = np.sort(np.asarray(given, dtype=int))
  if index.ndim != 1 or not len(index) or len(np.unique(index)) < len(index):
    raise ValueError(f"{name}={list(given)}; allowed: distinct indices, at least one")
  if index[0] < 0 or index[-1] >= count:
    raise ValueError(f"{name} has {index[0]} … {index[-1]}; allowed: 0 … {count - 1}")
  return index


def check_partition(groups: Groups, count: int) -> None:
  """Raises ValueError unless each of 0 … count − 1 is in exactly one group, and none is empty."""
  members = sorted(int(i) for group in groups for i in group)
  if members != list(range(count)) or not all(len(group) for group in groups):
    given = [list(group) for group in groups]
    raise ValueError(f"groups={given}; allowed: a partition of 0 … {count - 1}, no group empty")
