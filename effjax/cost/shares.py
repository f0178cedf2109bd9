"""Which share of each parameter a token uses."""

from collections.abc import Iterator
from typing import Any

import jax

from effjax.core import trees
from effjax.core.typing import Params, PyTree
from effjax.layers.spec import LayerSpec, TransformerConfig
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
  pairs = zip(config.layers, layers, strict=True)
  return [leaf for spec, layer in pairs for leaf in _shares(spec, layer)], rest


def _shares(spec: LayerSpec, layer: PyTree) -> Iterator[tuple[Any, float]]:
  for name, tree in layer.items():
    share = getattr(spec.modules.get(name), "share", lambda path: 1.0)
    for path, leaf in trees.items(tree).items():
      yield leaf, share(path)
