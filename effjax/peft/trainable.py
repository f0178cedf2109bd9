"""Which parameters a parameter-efficient method trains."""

from collections.abc import Callable
from typing import Any

from effjax.core import trees
from effjax.core.typing import PyTree
from effjax.peft.beside import is_adapter


def trainable(params: PyTree) -> Callable[[str, Any], bool]:
  """A predicate for `trees.partition` that chooses the arrays the adapters in `params` train.

  It is what training does by itself (`trees.trained`), for whoever takes gradients by hand.

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
  if not any(is_adapter(leaf) for leaf in trees.items(params).values()):
    raise ValueError("params has nothing to train; allowed: what lora.add, ia3.add, tune, … return")
  paths = trees.trained(params)
  return lambda path, leaf: path in paths
