"""What mixers, feed-forward layers, transforms and models share: blocks and layer specs."""

from effjax.layers.axes import axes
from effjax.layers.context import Context, without_padding
from effjax.layers.embedding import Embed, sinusoidal_positions
from effjax.layers.linear import Linear, weight
from effjax.layers.mlp import MLP, activation, hidden_units
from effjax.layers.norms import LayerNorm, RMSNorm
from effjax.layers.rotary import Rope
from effjax.layers.routing import ExpertRouting, Router, Routing
from effjax.layers.spec import FeedForward, LayerSpec, Mixer, TransformerConfig
from effjax.layers.taps import capture

__all__ = [
  "MLP",
  "Context",
  "Embed",
  "ExpertRouting",
  "FeedForward",
  "LayerNorm",
  "LayerSpec",
  "Linear",
  "Mixer",
  "RMSNorm",
  "Rope",
  "Router",
  "Routing",
  "TransformerConfig",
  "activation",
  "axes",
  "capture",
  "hidden_units",
  "sinusoidal_positions",
  "weight",
  "without_padding",
]
