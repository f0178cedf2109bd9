"""Caches: their shape buckets, the prefill that fills them, and layouts that decode fast.

A token's slot in a cache is its position. Prompts are padded on the right: what the padding wrote
to slots past a row's length is hidden by the causal mask, and overwritten when the row gets there.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from effjax.core.typing import Array, Int, Params, PyTree
from effjax.layers.stack import unscan

SMALLEST_BUCKET = 16


def bucket(length: int) -> int:
  """`length` rounded up so that few shapes occur: to a quarter of the power of two below it.

  At least 16; wastes at most a quarter; four shapes for each doubling.

  Example:
    >>> [bucket(n) for n in (1, 16, 17, 65, 100, 192, 193)]
    [16, 16, 20, 80, 112, 192, 224]
  """
  if length <= SMALLEST_BUCKET:
    return SMALLEST_BUCKET
  step = 1 << ((length - 1).bit_length() - 3)
  return -(-length // step) * step


def prefill(module: nn.Module, params: Params, tokens: Int[Array, "B T"], cache: PyTree) -> PyTree:
  """The cache after positions 0 … T−1 hold `tokens`; no logits are computed.

  Args:
    module: a decoder with `config`, called with tokens, positions and cache.
    params: its parameters.
    tokens: [B, T], padded on the right with any ids.
    cache: what `module.init_cache` gives.
  """
  headless = module.clone(config=dataclasses.replace(module.config, head=None))
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
  return headless.apply({"params": params}, tokens, positions=positions, cache=cache)[1]


def unrolled(module: nn.Module, params: Params) -> tuple[nn.Module, Params]:
  """The same model with every layer's parameters in arrays of their own, which decodes faster.

  A scan slices the stacked parameters, and on a CPU each slice of a float32 stack is a copy: three
  times the memory traffic of the product it is for, where decoding is nothing but that traffic
  (half the speed, measured on SmolLM2). Compile time then grows with depth, and while both exist
  the parameters take twice their memory.

  Example:
    module, params = unrolled(model.module, model.params)
    generate(module, params, prompts, max_new_tokens=128)
  """
  config, params = unscan(module.config, params)
  return module.clone(config=config), params
