"""Bytes that training holds on each device: model state, activations, buffers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from effjax.core import trees
from effjax.core.known import number
from effjax.core.typing import DTypeLike, Number, Size

# Bytes a parameter: (weights, gradients, optimiser state).
BYTES = {"paper": (2, 2, 12), "framework": (4, 4, 8)}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device.

  Attributes:
    weights, gradients, optimizer: the model state.
    activations: what the forward pass keeps for the backward pass.
    buffers: temporaries and fragmentation.
  """

  weights: Number
  gradients: Number
  optimizer: Number
  activations: Number = 0.0
  buffers: Number = 0.0

  @property
  def state(self) -> float:
    return float(self.weights + self.gradients + self.optimizer)

  @property
  def total(self) -> float:
    return self.state + self.activations + self.buffers


def zero_memory(
  parameters: Number, dp: Size, stage: Size, *, optimizer_bytes: Number = 12
) -> float:
  """Bytes of model state on each of N devices (ZeRO, arXiv 1910.02054, section 3.1 and Figure 1).

  Mixed precision with Adam: 2Φ weights, 2Φ gradients, KΦ optimiser state with K = 12 (a float32
  copy, momentum, variance). Stage 1 divides the optimiser state by N, stage 2 the gradients too,
  stage 3 the weights too:  4Φ + KΦ/N,  2Φ + (2 + K)Φ/N,  (4 + K)Φ/N.

  Args:
    parameters: Φ.
    dp: degree N of data parallelism.
    stage: 0 … 3.
    optimizer_bytes: K.

  Raises:
    ValueError: for a degree below 1, another stage, and numbers below 0.

  Example:
    7.5 B parameters on 64 devices, in GB: published as 120, 31.4, 16.6, 1.88.

    >>> [round(zero_memory(7.5e9, 64, stage) / 1e9, 2) for stage in range(4)]
    [120.0, 31.41, 16.64, 1.88]
  """
  optimizer_bytes = number("optimizer_bytes", optimizer_bytes, least=0)
  weights, gradients, _ = BYTES["paper"]
  return _state(parameters, dp, stage, (weights, gradients, optimizer_bytes)).state


def vram(
  parameters: Number,
  *,
  activations: Number = 0.0,
  buffers: Number = 0.0,
  dp: Size = 1,
  stage: Size = 0,
  mode: str = "paper",
) -> Memory:
  """Bytes that a training step holds on each device, by kind.

  Mode "paper": 16-bit weights and gradients and 12 bytes of float32 optimiser state. Mode
  "framework", what this library allocates: float32 weights and gradients and Adam's two moments;
  there is no second copy, and 16-bit operands are cast where they are used. Both come to 16Φ.

  Args:
    parameters: Φ.
    activations: bytes, as `transformer_activations` estimates or `residual_bytes` counts them.
    buffers: bytes of temporaries, as `compiled(...).temporaries` has them.
    dp, stage: as in `zero_memory`.
    mode: "paper" or "framework".

  Raises:
    ValueError: as `zero_memory`, and for another mode.

  Example:
    A 7 B model, in GB: 14 weights, 14 gradients, 84 optimiser state, 112 in all.

    >>> m = vram(7e9)
    >>> [round(x / 1e9) for x in (m.weights, m.gradients, m.optimizer, m.state)]
    [14, 14, 84, 112]
  """
  if mode not in BYTES:
    raise ValueError(f"mode {mode!r}; allowed: {', '.join(BYTES)}")
  activations = number("activations", activations, least=0)
  buffers = number("buffers", buffers, least=0)
  state = _state(parameters, dp, stage, BYTES[mode])
  return dataclasses.replace(state, activations=activations, buffers=buffers)


def transformer_activations(
  batch: Size, length: Size, width: Size, heads: Size, layers: Size, *, recompute: str = "none"
) -> int:
  """Bytes of 16-bit activations of a GPT kept for the backward pass (arXiv 2205.05198, section 4).

  A layer keeps T·B·D·(34 + 5·N·T/D) bytes with "none" recomputed; 34·T·B·D without the scores
  ("selective", and what blockwise attention keeps); its input alone, 2·T·B·D, with "full".

  Raises:
    ValueError: for another `recompute`, and for a number below 0.

  Example:
    >>> sizes = ["none", "selective", "full"]
    >>> [transformer_activations(1, 2048, 4096, 32, 1, recompute=s) / 2**20 for s in sizes]
    [912.0, 272.0, 16.0]
  """
  size = functools.partial(number, integer=True, least=0)
  batch, length, width = size("batch", batch), size("length", length), size("width", width)
  heads, layers = size("heads", heads), size("layers", layers)
  element = batch * length * width
  per_layer = {
    "none": 34 * element + 5 * heads * batch * length**2,
    "selective": 34 * element,
    "full": 2 * element,
  }
  if recompute not in per_layer:
    raise ValueError(f"recompute {recompute!r}; allowed: {', '.join(per_layer)}")
  return layers * per_layer[recompute]


def residual_bytes(fn: Callable, *args) -> int:
  """Bytes that the forward pass of `fn` keeps for its gradient by the first argument.

  Traced, not run: shapes suffice. Arguments kept as they are count too: a matrix product keeps
  its weight. What the compiler then recomputes or shares is not seen; `compiled` sees it.

  Example:
    >>> import jax.numpy as jnp
    >>> residual_bytes(lambda x: jnp.sin(x).sum(), jax.ShapeDtypeStruct((10,), jnp.float32))
    40
  """
  backward = lambda first, *rest: jax.vjp(lambda x: fn(x, *rest), first)[1]
  return trees.nbytes(jax.eval_shape(backward, *args))


def cache_bytes(module: Any, batch: Size, length: Size, *, dtype: DTypeLike | None = None) -> int:
  """Bytes of `module.init_cache(batch, length, dtype=dtype)`, what decoding keeps.

  Nothing is allocated.

  Raises:
    ValueError: for a batch or length below 1, and as `init_cache`.

  Example:
    Keys and values of 2 rows and 8 positions, 2 heads 16 wide, 3 layers, in float32, a flag for
    each slot, and where each row ends:

    >>> from effjax.models import Transformer, presets
    >>> config = presets.llama(64, 32, layers=3, heads=2)
    >>> cache_bytes(Transformer(config), 2, 8) == 3 * 2 * 8 * (2 * 2 * 16 * 4 + 1) + 2 * 4
    True

    In int8 an entry takes a byte, and each key and value a scale of four:

    >>> cache_bytes(Transformer(config), 2, 8, dtype="int8") == (
    ...   3 * 2 * 8 * (2 * 2 * (16 + 4) + 1) + 2 * 4
    ... )
    True
  """
  batch = number("batch", batch, integer=True, least=1)
  length = number("length", length, integer=True, least=1)
  empty = lambda: jax.tree.leaves(module.init_cache(batch, length, dtype=dtype))
  return trees.nbytes(jax.eval_shape(empty))


def _state(parameters: Number, dp: Size, stage: Size, bytes_each: tuple) -> Memory:
  parameters = number("parameters", parameters, least=0)
  dp = number("dp", dp, integer=True, least=1)
  stage = number("stage", stage, integer=True, least=0, most=3)
  sharded_from = (3, 2, 1)
  held = (
    each * parameters / (dp if stage >= first else 1)
    for each, first in zip(bytes_each, sharded_from, strict=True)
  )
  return Memory(*held)
