"""Adapters apart from the model that they adapt: taken off and put on."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from effjax.core import trees
from effjax.core.typing import PyTree
from effjax.core.weights import Weight
from effjax.peft.beside import Tuned, is_adapter


def detach(params: PyTree) -> tuple[PyTree, dict[str, Weight]]:
  """`params` without its adapters, and path → adapter without its base (None stands for it).

  What is new, a `Tuned` over nothing, leaves no path behind.

  Raises:
    ValueError: when `params` holds no adapter.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from effjax.peft import lora
    >>> params = {"kernel": jnp.ones((3, 4))}
    >>> base, adapters = detach(lora.add(params, jax.random.key(0), rank=2, targets="kernel"))
    >>> base["kernel"].shape, adapters["kernel"].a.shape, adapters["kernel"].base
    ((3, 4), (3, 2), None)
  """
  found = {path: leaf for path, leaf in trees.items(params).items() if is_adapter(leaf)}
  if not found:
    raise ValueError(
      "params has no adapter; allowed: what tune and the add of lora, ia3, adapters, … give"
    )
  base = trees.update(params, lambda path, leaf: path in found, lambda path, leaf: _base(leaf))
  for path, leaf in found.items():
    base = _without(base, path.split("/")) if is_new(leaf) else base
  return base, {path: _without_base(leaf) for path, leaf in found.items()}


def attach(params: PyTree, adapters: Mapping[str, Weight]) -> PyTree:
  """`params` with the adapters at their paths: the inverse of `detach`, over this base or another.

  A module that has only new parameters computes where the configuration names it.

  Raises:
    ValueError: when there is no parameter at a path, an adapter is there, one does not fit it, or,
      of a new parameter, when there is something or the layer is missing or of another stack.
  """
  leaves = trees.items(params)
  new = {path: adapter for path, adapter in adapters.items() if is_new(adapter)}
  over = {path: adapter for path, adapter in adapters.items() if path not in new}
  for path in over:
    if path not in leaves:
      raise ValueError(f"adapters: params has nothing at {path!r}; allowed: {trees.some(leaves)}")
    if is_adapter(leaves[path]):
      raise ValueError(f"adapters: {path!r} has one already; merge or detach it first")

  def put(path: str, leaf: Any) -> Weight:
    try:
      return _over(over[path], leaf)
    except ValueError as error:
      raise ValueError(f"adapters: {path!r} {tuple(leaf.shape)}: {error}") from error

  changed = trees.update(params, lambda path, leaf: path in over, put) if over else params
  for path, adapter in new.items():
    _check_new(path, adapter, leaves)
    changed = _with(changed, path.split("/"), adapter)
  return changed


def is_new(adapter: Any) -> bool:
  """Whether an adapter, over how many others ever, is a parameter where there was none."""
  if isinstance(adapter, Tuned) and adapter.new:
    return True
  return is_adapter(adapter) and is_new(adapter.base)


def _base(leaf: Any) -> Any:
  return _base(leaf.base) if is_adapter(leaf) else leaf


def _without_base(leaf: Any) -> Any:
  return dataclasses.replace(leaf, base=_without_base(leaf.base)) if is_adapter(leaf) else None


def _over(adapter: Any, leaf: Any) -> Any:
  return leaf if adapter is None else dataclasses.replace(adapter, base=_over(adapter.base, leaf))


def _without(tree: Any, names: list[str]) -> Any:
  """`tree` without what is at a path, and without the modules that this leaves empty."""
  first, *rest = names
  if not isinstance(tree, Mapping):
    raise ValueError(f"params: {first!r} is new in a {type(tree).__name__}; allowed: in a dict")
  inner = _without(tree[first], rest) if rest else None
  kept = {name: value for name, value in tree.items() if name != first}
  same: Any = type(tree)
  return same(kept | {first: inner} if inner else kept)


def _with(tree: Any, names: list[str], leaf: Any) -> Any:
  first, *rest = names
  inner = _with(tree.get(first, {}), rest, leaf) if rest else leaf
  return type(tree)({**tree, first: inner})


def _check_new(path: str, adapter: Weight, leaves: Mapping[str, Any]) -> None:
  """Raises ValueError where a new parameter has no place."""
  within = lambda a, b: f"{a}/".startswith(f"{b}/")
  taken = [other for other in leaves if within(path, other) or within(other, path)]
  if taken:
    raise ValueError(f"adapters: {path!r} is new, and params has {taken[0]!r}; allowed: nothing")
  layer = re.match(r"segments_\d+/layers_\d+/", path)
  if layer is None:
    return
  beside = [leaf for other, leaf in leaves.items() if other.startswith(layer[0])]
  if not beside:
    raise ValueError(f"adapters: {path!r}: params has no {layer[0]}; allowed: {trees.some(leaves)}")
  stacks = {leaf.shape[0] for leaf in beside if len(leaf.shape)}
  scanned = len(stacks) == 1 and all(len(leaf.shape) > 1 for leaf in beside)
  if scanned and tuple(adapter.shape[:1]) != (*stacks,):
    given = f"adapters: {path!r} has shape {tuple(adapter.shape)}"
    raise ValueError(f"{given}; allowed: {(*stacks,)[0]} layers in its first axis, as beside it")
