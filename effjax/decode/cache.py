"""Caches: their shape buckets, the prefill that fills them, and layouts that decode fast.

Padding has a negative segment id: mixers neither write nor absorb it, so that prompts of any
lengths, padded on either side, leave the caches that each row alone would.
"""

import dataclasses
from typing import Any, TypeVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from effjax.core.known import known, number
from effjax.core.typing import Array, Int, Params, PyTree, Size
from effjax.layers.context import Context
from effjax.layers.stack import unscan

SMALLEST_BUCKET = 16
Module = TypeVar("Module", bound=nn.Module)


def bucket(length: Size) -> int:
  """`length` rounded up so that few shapes occur: to a quarter of the power of two below it.

  At least 16; wastes at most a quarter; four shapes for each doubling.

  Raises:
    ValueError: for a length below 0.

  Example:
    >>> [bucket(n) for n in (1, 16, 17, 65, 100, 192, 193)]
    [16, 16, 20, 80, 112, 192, 224]
  """
  length = number("length", length, integer=True, least=0)
  if length <= SMALLEST_BUCKET:
    return SMALLEST_BUCKET
  step = 1 << ((length - 1).bit_length() - 3)
  return -(-length // step) * step


def prefill(
  module: nn.Module,
  params: Params,
  tokens: Int[Array | np.ndarray, "B T"],
  lengths: Int[Array | np.ndarray, "B"],
  cache: PyTree,
  *,
  padding: str = "right",
) -> PyTree:
  """The cache after each row's tokens are absorbed, at positions 0 … lengths[b] − 1; no logits.

  Args:
    module: a decoder with `config`, called with tokens, positions, segment_ids, previous and
      cache.
    params: its parameters.
    tokens: [B, T]; the padding may hold any ids.
    lengths: [B], how many tokens of each row there are, from none to T.
    cache: what `module.init_cache` gives.
    padding: on which side of a row the rest lies, "right" or "left".

  Raises:
    ValueError: for another `padding`, and for lengths, where they are known, that are none.

  Example:
    >>> import jax
    >>> from effjax.models import Transformer, presets
    >>> module = Transformer(presets.TINY)
    >>> params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> rows, lengths = jnp.array([[1, 2, 3], [4, -100, -100]]), jnp.array([3, 1])
    >>> fill = jax.jit(prefill, static_argnums=0)
    >>> cache = fill(module, params, rows, lengths, module.init_cache(2, 16))
  """
  check_padding(padding)
  _check_lengths(lengths, tokens)
  column = jnp.arange(tokens.shape[1])[None]
  lengths = jnp.asarray(lengths)[:, None]
  present = column < lengths if padding == "right" else column >= tokens.shape[1] - lengths
  positions = jnp.cumsum(present, axis=1, dtype=jnp.int32) - 1
  headless = module.clone(config=dataclasses.replace(module.config, head=None))
  segment_ids = present.astype(jnp.int32) - 1
  _, filled = headless.apply(
    {"params": params},
    tokens,
    positions=positions,
    segment_ids=segment_ids,
    previous=Context(jnp.asarray(tokens), segment_ids=segment_ids).previous_ids(),
    cache=cache,
  )
  return filled


def _check_lengths(lengths: Array | np.ndarray, tokens: Array | np.ndarray) -> None:
  if tuple(lengths.shape) != tuple(tokens.shape[:1]):
    raise ValueError(f"lengths: shape {lengths.shape}; allowed: {tokens.shape[:1]}, one a row")
  if not jnp.issubdtype(lengths.dtype, jnp.integer):
    raise ValueError(f"lengths: {lengths.dtype}; allowed: integers")
  values = known(lengths)
  wrong: Any = () if values is None else values[(values < 0) | (values > tokens.shape[1])]
  if len(wrong):
    raise ValueError(f"lengths: {wrong[0]}; allowed: 0 … {tokens.shape[1]}, the width of tokens")


def check_padding(padding: str) -> None:
  """Raises ValueError unless it is a side of a row."""
  if padding not in ("right", "left"):
    raise ValueError(f"padding={padding!r}; allowed: 'right' or 'left'")


def unrolled(module: Module, params: Params) -> tuple[Module, Params]:
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
