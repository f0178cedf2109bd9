"""Flax building blocks that mixers, feed-forward layers and models share."""

from effjax.layers.context import Context
from effjax.layers.embedding import Embed, sinusoidal_positions
from effjax.layers.linear import Linear, weight
from effjax.layers.mlp import MLP, activation
from effjax.layers.norms import LayerNorm, RMSNorm
from effjax.layers.rotary import Rope

__all__ = [
  "MLP",
  "Context",
  "Embed",
  "LayerNorm",
  "Linear",
  "RMSNorm",
  "Rope",
  "activation",
  "sinusoidal_positions",
  "weight",
]
