"""Models as lists of layers; pretrained ones loaded and saved."""

from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.models.transformer import EncoderDecoder, Transformer

__all__ = ["EncoderDecoder", "LayerSpec", "Transformer", "TransformerConfig"]
