"""torch's flash attention as a contender, on jax's arrays."""

import importlib.util
from collections.abc import Callable
from typing import Any


def here() -> bool:
  """Whether there is a torch for this GPU."""
  if importlib.util.find_spec("torch") is None:
    return False
  import torch

  return torch.cuda.is_available()


def contender(
  arrays: tuple[Any, ...], causal: bool, backward: bool
) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
  """A call and what waits for it, see `gpu_times.medians`."""
  import torch
  from torch.nn.attention import SDPBackend, sdpa_kernel

  q, k, v, cotangent = (
    torch.from_dlpack(x).transpose(1, 2).contiguous().requires_grad_(backward) for x in arrays
  )

  def call():
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
      out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return torch.autograd.grad(out, (q, k, v), cotangent) if backward else out

  return call, lambda _: torch.cuda.synchronize()
