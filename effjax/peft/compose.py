"""Modules that compose: P = P_general + Σ_a w_a·P_a (Modular Retrieval, arXiv 2303.13419)."""

from collections.abc import Hashable, Mapping
from typing import Any

import jax

from effjax.core import trees
from effjax.core.typing import PyTree, Scalar


def compose(
  general: PyTree,
  modules: Mapping[Any, PyTree],
  weights: Mapping[Any, Scalar],
  *,
  mean: bool = False,
) -> PyTree:
  """P_general + Σ_a w_a·P_a over the modules that have a weight, leaf by leaf.

  Differentiable in everything. A module without a weight is not read, so that leaving one out is
  exact; one with a weight of 1 is added as it is.

  Args:
    general: a tree of arrays.
    modules: by name or number, trees of the same structure and shapes.
    weights: w_a of the modules that take part, numbers or traced ones.
    mean: whether Σ_a is divided by how many take part.

  Raises:
    ValueError: for a weight of a module that there is none of, or a tree of another structure.

  Example:
    >>> import jax.numpy as jnp
    >>> modules = {"law": {"w": jnp.array([1.0, 2.0])}, "mail": {"w": jnp.array([jnp.nan, 0.0])}}
    >>> compose({"w": jnp.ones(2)}, modules, {"law": 0.5})["w"].tolist()
    [1.5, 2.0]
  """
  for name in weights:
    _check(general, modules, name)
  if not weights:
    return general
  share = 1 / len(weights) if mean else 1
  scaled = [jax.tree.map(lambda x, w=w: w * share * x, modules[a]) for a, w in weights.items()]
  return jax.tree.map(lambda x, *rest: x + sum(rest[1:], rest[0]), general, *scaled)


def _check(general: PyTree, modules: Mapping[Any, PyTree], name: Hashable) -> None:
  """Raises ValueError unless there is a module `name` that can be added to `general`."""
  if name not in modules:
    allowed = trees.some(map(repr, modules)) or "none, there are no modules"
    raise ValueError(f"weights: module {name!r} is unknown; allowed: {allowed}")
  forms = [
    {path: tuple(leaf.shape) for path, leaf in trees.items(tree).items()}
    for tree in (general, modules[name])
  ]
  for path in dict.fromkeys((*forms[0], *forms[1])):
    own, wanted = (form.get(path, "absent") for form in reversed(forms))
    if own != wanted:
      raise ValueError(f"modules: {path!r} of {name!r} is {own}; allowed: {wanted}, the general's")
