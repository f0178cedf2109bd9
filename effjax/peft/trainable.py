"""Which parameters a parameter-efficient method trains."""

from collections.abc import Callable, Iterator
from typing import Any

from effjax.core import trees
from effjax.core.typing import PyTree
from effjax.peft.lora import LoRA


def trainable(params: PyTree) -> Callable[[str, Any], bool]:
  """A predicate for `trees.partition` that chooses the arrays the adapters in `params` train.

  Differentiating and optimising the first of the two trees leaves no gradient and no optimiser
  state for anything else.

  Raises:
    ValueError: when `params` holds no adapter.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from effjax.peft import lora
    >>> params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    >>> params = lora.add(params, jax.random.key(0), rank=2, targets="kernel")
    >>> chosen, frozen = trees.partition(params, trainable(params))
    >>> sorted(trees.path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(chosen))
    ['kernel/a', 'kernel/b']
  """
  paths = frozenset(
    name for path, leaf in trees.items(params).items() for name in _arrays(path, leaf)
  )
  if not paths:
    raise ValueError("params has nothing to train; allowed: what lora.add returns")
  return lambda path, leaf: path in paths


def _arrays(path: str, leaf: Any) -> Iterator[str]:
  if isinstance(leaf, LoRA):
    yield from (f"{path}/a", f"{path}/b")
    yield from _arrays(f"{path}/base", leaf.base)
