"""Floating-point operations of matrix products, two per multiply-add."""

from effjax.layers.spec import TransformerConfig


def flops(config: TransformerConfig, length: int) -> float:
  """Matrix-product FLOPs a token, forward, averaged over a sequence of `length` tokens.

  Σ over layers of what each module's `flops(width, length)` says, and 2·V·D of the head. Training
  takes three times as much: the backward pass computes two products for each one forward.

  Args:
    config: the model.
    length: tokens of the sequence, at least 1; attention pays for the keys its mask shows.

  Raises:
    ValueError: for a length below 1.

  Example:
    >>> from effjax.layers import MLP
    >>> from effjax.layers.spec import LayerSpec
    >>> flops(TransformerConfig(16, 4, (LayerSpec(None, MLP(8)),)), 10)
    256.0
  """
  if length < 1:
    raise ValueError(f"length {length}; allowed: from 1")
  places = ("mixer", "cross", "ffn")
  modules = [getattr(spec, place) for spec in config.layers for place in places]
  layers = sum(module.flops(config.width, length) for module in modules if module is not None)
  return float(layers + _ends(config))


def _ends(config: TransformerConfig) -> float:
  table_width = config.embed_width or config.width
  head = 2.0 * config.vocab_size * table_width if config.head else 0.0
  if config.embed_width is None:
    return head
  projections = 2 if config.head else 1
  return head + projections * 2.0 * config.embed_width * config.width


def sequence_flops(
  tokens: int, layers: int, width: int, vocab: int, *, factor: int | float = 12.0
) -> float:
  """FLOPs of training on one sequence: T · (6·a·L·D² + 12·L·D·T + 6·V·D).

  The convention of the DeepSeekMoE paper (arXiv 2401.06066, Tables 2 and 5): a·D² parameters a
  layer, of which a token uses all; a = 12 in a dense Transformer (4 attention, 8 FFN), 20 with two
  equivalents of that FFN active; scores over all T keys, no causal discount; forward and backward.

  Args:
    tokens: T.
    layers, width, vocab: L, D, V.
    factor: a.

  Example:
    The published 183.5 T of DeepSeek 7B and 74.4 T of DeepSeekMoE 16B, for 4096 tokens:

    >>> round(sequence_flops(4096, 30, 4096, 102_400) / 1e12, 2)
    183.48
    >>> round(sequence_flops(4096, 28, 2048, 102_400, factor=20) / 1e12, 2)
    74.42
  """
  per_layer = 6 * factor * width**2 + 12 * width * tokens
  return float(tokens * (layers * per_layer + 6 * vocab * width))
