"""Adapters multiplied into the matrices that they stand over, and taken out of them again."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from effjax.core import trees
from effjax.core.typing import Array, PyTree
from effjax.core.weights import entries, is_weight, materialize, offset
from effjax.peft.beside import is_adapter, naming
from effjax.peft.starts import Represent, check_represent


def merge(params: PyTree, represent: Represent | None = None) -> PyTree:
  """`params` with the matrix that each adapter computes with in its place, such as W0 + s·A B.

  The bias beside a matrix whose outputs an adapter multiplies whole (IA³) is multiplied too.

  Args:
    params: a tree with adapters of any kind that stand over something.
    represent: (path, matrix) → what stands for a matrix whose base was quantised, as
      `NF4.represent`; None leaves the array.

  Raises:
    ValueError: when there is no adapter in `params`, one is new in the model and stands over
      nothing, as a prefix, has rows that its matrix has not, as a soft prompt, or is no single
      matrix; for a `represent` that is no function.

  Example:
    >>> import jax
    >>> from effjax.peft.lora import add
    >>> adapted = add({"kernel": jnp.eye(2)}, jax.random.key(0), rank=1, targets="kernel")
    >>> merge(adapted)["kernel"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
  """
  check_represent(represent)
  chosen = _adapters(params)
  beside = _biases(chosen)

  def change(path: str, leaf: Any) -> Any:
    if path not in chosen:
      return offset(beside[path], leaf)
    with naming(path):
      base, matrix = _innermost(leaf), leaf.materialize()
      plain = represent(path, matrix) if represent and is_weight(base) else matrix
    return offset(beside.get(path), plain)

  return trees.update(params, lambda path, leaf: path in chosen or path in beside, change)


def unmerge(merged: PyTree, adapted: PyTree) -> PyTree:
  """The inverse of `merge`: the adapters of `adapted`, over what makes the matrices of `merged`.

  A number that is what `merge` gave comes back as that of the base, to the bit; one that has been
  changed since, as the difference, W − s·A B, within a rounding of the larger of both. A quantised
  base comes back as the array that it stood for.

  Args:
    merged: what `merge` gave, possibly changed since.
    adapted: the tree that was merged.

  Raises:
    ValueError: when `adapted` has no adapter, `merged` no array of that shape in its place, or one
      cannot be taken out of it again.
  """
  chosen, plain, leaves = _adapters(adapted), trees.items(merged), trees.items(adapted)
  beside = {path: leaf for path, leaf in _biases(chosen).items() if path in leaves}
  for path, leaf in chosen.items():
    if path not in plain or tuple(plain[path].shape) != leaf.shape or is_weight(plain[path]):
      raise ValueError(f"merged has no plain matrix {leaf.shape} at {path}")

  def change(path: str, w: Array) -> Any:
    if path in beside:
      w = _bias_that_makes(beside[path], materialize(leaves[path]), w)
    if path not in chosen:
      return w
    with naming(path):
      _innermost(chosen[path])
      return _over_what_makes(chosen[path], w)

  return trees.update(merged, lambda path, leaf: path in chosen or path in beside, change)


def _adapters(params: PyTree) -> dict[str, Any]:
  """Path → adapter.

  Raises:
    ValueError: when there is none.
  """
  found = {path: leaf for path, leaf in trees.items(params).items() if is_adapter(leaf)}
  if not found:
    raise ValueError("params has no adapter; allowed: what lora.add returns")
  return found


def _innermost(leaf: Any) -> Any:
  """What is under an adapter and those that it stands over.

  Raises:
    ValueError: when that is nothing, or one of them is more than a matrix.
  """
  if leaf is None:
    raise ValueError(
      "is new in the model, with nothing under it to be merged into; allowed: adapters that stand "
      "over a matrix, such as LoRA"
    )
  if len(leaf.shape) > 1 and entries(leaf) != leaf.shape[0]:
    raise ValueError(
      f"{leaf!r} has rows that its matrix has no place for; allowed: to take them off before, as "
      "soft_prompt.remove does"
    )
  return _innermost(leaf.base) if is_adapter(leaf) else leaf


def _biases(adapters: Mapping[str, Any]) -> dict[str, Any]:
  """Where the bias beside an adapter would be → the adapter."""
  kernels = {path: leaf for path, leaf in adapters.items() if path.endswith("kernel")}
  return {path.removesuffix("kernel") + "bias": leaf for path, leaf in kernels.items()}


def _bias_that_makes(w: Any, bias: Array, merged: Array) -> Array:
  """What the product with w adds `merged` for: `bias` where that is so."""
  factor = offset(w, jnp.ones_like(bias))
  return jnp.where(merged == offset(w, bias), bias, merged / jnp.where(factor == 0, 1, factor))


def _over_what_makes(leaf: Any, w: Array) -> Any:
  """An adapter over the array that it makes w of, in place of its base."""
  base = jnp.where(w == leaf.materialize(), materialize(leaf.base), leaf.beneath(w))
  under = _over_what_makes(leaf.base, base) if is_adapter(leaf.base) else base
  return dataclasses.replace(leaf, base=under)
