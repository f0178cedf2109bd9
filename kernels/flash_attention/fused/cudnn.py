"""Attention by cuDNN where it can honour the arguments, else by the GPU kernel, saying why."""

from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from effjax.core.typing import Array, Float
from effjax.kernels.flash_attention.fused import gpu


def attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  *,
  return_lse: bool = False,
  **arguments: Any,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"] | None]:
  """Attention, arguments as of `tiled.xla.attention`; no log-sum-exp unless `return_lse`."""
  band = _band(arguments["mask"])
  refused = refusal(query, key, value, return_lse=return_lse, **arguments)
  if band is None or refused:
    logging.log_first_n(logging.WARNING, "attention: not by cuDNN: %s", 1, refused)
    return gpu.attention(query, key, value, **arguments)
  left, right = band
  out = jax.nn.dot_product_attention(
    query,
    key,
    value,
    bias=arguments["bias"],
    scale=arguments["scale"],
    is_causal=right == 0,
    local_window_size=None if left is None else (left, 0),
    implementation="cudnn",
  )
  return out, None


def refusal(query: Array, key: Array, value: Array, *, return_lse: bool, **arguments) -> str | None:
  """What cuDNN cannot honour, or None."""
  band, bias = _band(arguments["mask"]), arguments["bias"]
  reasons = {
    f"type {query.dtype}": query.dtype not in (jnp.bfloat16, jnp.float16),
    "the log-sum-exp": return_lse,
    f"mask {arguments['mask']}": band is None,
    "fewer queries than keys": band not in (None, (None, None)) and query.shape[1] != key.shape[1],
    "a bias shared along queries or keys": (
      bias is not None and bias.shape[2:] != (query.shape[1], key.shape[1])
    ),
    "scores": arguments.get("scores") is not None,
    "a soft cap": arguments["logit_softcap"] is not None,
    "segment ids": arguments["segment_ids"] is not None,
    "query positions": arguments["query_positions"] is not None,
    f"head widths {query.shape[-1]} and {value.shape[-1]}": (
      query.shape[-1] != value.shape[-1] or query.shape[-1] % 8 > 0 or query.shape[-1] > 128
    ),
  }
  return next((reason for reason, holds in reasons.items() if holds), None)


def _band(mask: Any) -> tuple[int | None, int | None] | None:
  """(left, right) of a band that cuDNN knows: everything, or causal, with a window or without."""
  return mask.band if mask.band == (None, None) or (mask.band and mask.band[1] == 0) else None
