"""Which share of each parameter a token uses."""

from typing import Any

import jax

from effjax.core import trees
from effjax.core.typing import Params
from effjax.layers.spec import TransformerConfig, share
from effjax.layers.stack import split


def in_layers(
  config: TransformerConfig, params: Params
) -> tuple[list[tuple[Any, float]], dict[str, Any]]:
  """Each parameter in a layer, as its shapes, with the share that a token uses; and all others.

  A module whose parameters are not all used by each token says so in `share(path)`; without it,
  the share is 1.

  Args:
    config: the model's layers.
    params: its parameters, or their shapes.
  """
  layers, rest = jax.eval_shape(lambda tree: split(config, tree), params)
  found = [
    (leaf, share(spec.modules, path))
    for spec, layer in zip(config.layers, layers, strict=True)
    for path, leaf in trees.items(layer).items()
  ]
  return found, rest
