"""Floating-point operations of matrix products, two per multiply-add."""

import functools
import math
from typing import Any

from effjax.core import trees
from effjax.core.known import number
from effjax.core.typing import Number, Params, Size
from effjax.cost.shares import in_layers
from effjax.layers.spec import TransformerConfig, stated


def flops(
  config: TransformerConfig, length: Size, params: Params | None = None, queries: Size | None = None
) -> float:
  """Matrix-product FLOPs a token, forward, averaged over the last `queries` of `length` tokens.

  Σ over layers of what each module's `flops(width, length, queries)` says, and 2·V·D of the head.
  That is for plain matrices; a `Weight` [D, F] in `params` adds what its own `flops` are above
  2·D·F, or takes away what they are below, as often as a token uses it: k of E times for routed
  experts, never for a table of which only rows are read. Training takes three times as much: the
  backward pass computes two products for each one forward.

  Args:
    config: the model.
    length: tokens of the sequence, at least 1; attention pays for the keys its mask shows.
    params: its parameters, or their shapes.
    queries: how many of the last tokens are computed, the others lying in a cache: 1 for decoding;
      None means all.

  Raises:
    ValueError: for a length below 1, queries outside of 1 … length, or a module without `flops`.

  Example:
    >>> from effjax.layers import MLP
    >>> from effjax.layers.spec import LayerSpec
    >>> flops(TransformerConfig(16, 4, (LayerSpec(None, MLP(8)),)), 10)
    256.0
  """
  length = number("length", length, integer=True, least=1)
  if queries is not None:
    queries = number("queries", queries, integer=True, least=1, most=length)
  of_layers = sum(
    count(config.width, length, queries)
    for layer in stated(config, "flops")
    for count in layer.values()
  )
  return float(of_layers + _ends(config) + (0.0 if params is None else _added(config, params)))


def _ends(config: TransformerConfig) -> float:
  table_width = config.embed_width or config.width
  head = 2.0 * config.vocab_size * table_width if config.head else 0.0
  if config.embed_width is None:
    return head
  projections = 2 if config.head else 1
  return head + projections * 2.0 * config.embed_width * config.width


def _added(config: TransformerConfig, params: Params) -> float:
  """FLOPs a token of the weights in `params`, beyond those of plain matrices."""
  layers, rest = in_layers(config, params)
  multiplied = {path: leaf for path, leaf in trees.items(rest).items() if _multiplies(config, path)}
  inside = sum(share * _beyond(leaf) for leaf, share in layers)
  return inside + sum(_beyond(leaf) for leaf in multiplied.values())


def _multiplies(config: TransformerConfig, path: str) -> bool:
  """Whether tokens are multiplied with what is outside of the layers, not rows of it read."""
  tied = config.head is not None and config.tied
  return not path.endswith("/embedding") or (tied and path == "embed/embedding")


def _beyond(leaf: Any) -> float:
  if not trees.is_weight(leaf) or leaf.ndim < 2:
    return 0.0
  *batch, D, F = leaf.shape
  return math.prod(batch) * (leaf.flops - 2.0 * D * F)


def sequence_flops(
  tokens: Size, layers: Size, width: Size, vocab: Size, *, factor: Number = 12.0
) -> float:
  """FLOPs of training on one sequence: T · (6·a·L·D² + 12·L·D·T + 6·V·D).

  The convention of the DeepSeekMoE paper (arXiv 2401.06066, Tables 2 and 5): a·D² parameters a
  layer, of which a token uses all; a = 12 in a dense Transformer (4 attention, 8 FFN), 20 with two
  equivalents of that FFN active; scores over all T keys, no causal discount; forward and backward.

  Args:
    tokens: T.
    layers, width, vocab: L, D, V.
    factor: a.

  Raises:
    ValueError: for a number below 0.

  Example:
    The published 183.5 T of DeepSeek 7B and 74.4 T of DeepSeekMoE 16B, for 4096 tokens:

    >>> round(sequence_flops(4096, 30, 4096, 102_400) / 1e12, 2)
    183.48
    >>> round(sequence_flops(4096, 28, 2048, 102_400, factor=20) / 1e12, 2)
    74.42
  """
  size = functools.partial(number, integer=True, least=0)
  tokens, layers = size("tokens", tokens), size("layers", layers)
  width, vocab = size("width", width), size("vocab", vocab)
  per_layer = 6 * number("factor", factor, least=0) * width**2 + 12 * width * tokens
  return float(tokens * (layers * per_layer + 6 * vocab * width))
