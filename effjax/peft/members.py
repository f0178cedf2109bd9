"""What combinations and named adapters are made of: LoRAs over one base."""

from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import trees
from effjax.core.known import known
from effjax.core.typing import PyTree
from effjax.peft.beside import is_adapter
from effjax.peft.low_rank import LoRA


def family(of: str, adapters: PyTree) -> dict[str, LoRA]:
  """Path → LoRA, or what is made from it, of a tree or of what `detach` takes off one.

  Raises:
    ValueError: where it holds none, several at a path, or an adapter of another kind.
  """
  found = {path: leaf for path, leaf in trees.items(adapters).items() if is_adapter(leaf)}
  for path, leaf in found.items():
    if not isinstance(leaf, LoRA):
      kind = type(leaf).__name__
      raise ValueError(f"adapters: {of} has {kind} at {path}; allowed: LoRA")
    if is_adapter(leaf.base):
      raise ValueError(f"adapters: {of} has several at {path}; allowed: one")
  if not found:
    raise ValueError(f"adapters: {of} has none; allowed: a tree with LoRA, or what detach gives")
  return found


def is_same(one: Any, other: Any) -> bool:
  """Whether two matrices, arrays or weights, are equal, as far as their values are known."""
  if one is other:
    return True
  forms: Any = [jax.tree.structure(each) for each in (one, other)]
  if forms[0] != forms[1]:
    return False
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  equal = [known(jnp.array_equal(x, y, equal_nan=True)) for x, y in pairs]
  return all(same is None or bool(same) for same in equal)
