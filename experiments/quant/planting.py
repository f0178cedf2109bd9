"""Outliers planted in a model, whose function stays as it is."""

import jax
import numpy as np

from effjax.core import trees
from effjax.core.typing import PyTree
from effjax.layers import LayerSpec, stack
from experiments.lab.subject import Subject


def planted(subject: Subject, factor: float, channels: int) -> Subject:
  """The same function with outliers: gains of `channels` channels grow, the rows behind shrink.

  Raises:
    ValueError: for more channels than there are, and for a model whose norms end its layers: what
      they give is not for matrices alone.
  """
  config = subject.config
  if not 0 <= channels <= config.width:
    raise ValueError(f"channels={channels}; allowed: 0 … {config.width}, the width of the model")
  if config.arrangement == "post":
    raise ValueError("arrangement='post' of the model; allowed: norms before the layers")
  grow = np.ones(config.width, np.float32)
  grow[np.linspace(0, config.width, channels, endpoint=False, dtype=int)] = factor

  def change(_, spec: LayerSpec, tree: PyTree) -> tuple[LayerSpec, PyTree]:
    for place in ("mixer", "ffn"):
      if place in spec.modules:
        roles = spec.modules[place].axes
        reads = lambda path, w, roles=roles: roles.get(path, ())[-2:-1] == ("embed",)
        shrunk = trees.update(tree[place], reads, lambda path, w: w / grow[:, None])
        grown = jax.tree.map(lambda x: x * grow, tree[f"{place}_norm"])
        tree = {**tree, place: shrunk, f"{place}_norm": grown}
    return spec, tree

  return Subject(*stack.change(config, subject.params, change))
