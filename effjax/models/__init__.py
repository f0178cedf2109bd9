"""Models as lists of layers; pretrained ones loaded and saved."""

from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.models import exchange, presets
from effjax.models.loading import load
from effjax.models.model import Model, TokenIds, check_tokens
from effjax.models.saving import save
from effjax.models.transformer import EncoderDecoder, Transformer

__all__ = [
  "EncoderDecoder",
  "LayerSpec",
  "Model",
  "TokenIds",
  "Transformer",
  "TransformerConfig",
  "check_tokens",
  "exchange",
  "load",
  "presets",
  "save",
]
