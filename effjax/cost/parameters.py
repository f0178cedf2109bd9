"""Parameters counted: all, those a token uses, and those that are trained."""

import jax

from effjax.core import trees
from effjax.core.typing import Params, PyTree
from effjax.cost.shares import in_layers
from effjax.layers.spec import TransformerConfig


def parameters(params: PyTree) -> int:
  """All parameters; a quantised weight counts as the matrix it stands for. Shapes suffice.

  Example:
    >>> import jax.numpy as jnp
    >>> parameters({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
    9
  """
  return trees.count(params)


def active_parameters(config: TransformerConfig, params: Params) -> int:
  """Parameters that take part in computing one token: of a mixture, the chosen experts only.

  Each counts at the share that a token uses of it, which a module's `share(path)` says; all that
  is outside of the layers counts whole, embeddings included.

  Args:
    config: the model's layers.
    params: its parameters, or their shapes.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from effjax.layers import MLP, LayerSpec
    >>> config = TransformerConfig(16, 4, (LayerSpec(None, MLP(8)),), positions=None)
    >>> shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    >>> ffn = {"up": {"kernel": shape(4, 8)}, "down": {"kernel": shape(8, 4)}}
    >>> active_parameters(config, {"segments_0": {"layers_0": {"ffn": ffn}}})
    64
  """
  layers, rest = in_layers(config, params)
  return round(sum(share * trees.count(leaf) for leaf, share in layers)) + trees.count(rest)


def trainable(params: PyTree, chosen: trees.Chooser | None = None) -> int:
  """Numbers that receive gradients: of LoRA on a frozen base the two factors, not the matrix.

  Args:
    params: a parameter tree, or the first of the two that `trees.partition` gives.
    chosen: a pattern or predicate on the paths of arrays; None is what `trees.trained` says.

  Example:
    >>> import jax.numpy as jnp
    >>> trainable({"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "b")
    3
  """
  if chosen is not None:
    params, _ = trees.partition(params, chosen)
    return sum(leaf.size for leaf in jax.tree.leaves(params))
  paths = trees.trained(params)
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return sum(leaf.size for path, leaf in leaves if trees.path_string(path) in paths)


def state_bytes(*states: PyTree) -> int:
  """Bytes of every array in the given trees, as they are represented. Shapes suffice.

  Example:
    >>> import jax.numpy as jnp
    >>> state_bytes({"w": jnp.ones((2, 3), jnp.int8)}, jnp.ones(3))
    18
  """
  return sum(trees.nbytes(state) for state in states)
