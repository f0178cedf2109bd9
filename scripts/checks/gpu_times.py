"""Times of attention on a GPU: rates, shares of the matrix product's, ratios to peers."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from effjax.attention import attend, masks
from effjax.kernels.flash_attention.fused.sizes import choose

Row = dict[str, Any]
Contender = tuple[Callable[[], Any], Callable[[Any], Any]]  # starts work; waits for what it gave
TOKENS, MODEL = 16384, 2048  # tokens of a batch and heads × width, whatever the length
ENOUGH = 0.05  # seconds of work between two looks at the clock


def medians(contenders: dict[str, Contender], rounds: int = 7) -> dict[str, float]:
  """Seconds of a call, taking turns; a turn is as many calls as fill `ENOUGH`, waited for once."""
  count = {name: _calls(contender) for name, contender in contenders.items()}
  times: dict[str, list[float]] = {name: [] for name in contenders}
  for _, (name, contender) in itertools.product(range(rounds), contenders.items()):
    times[name].append(_seconds(contender, count[name]))
  return {name: statistics.median(each) for name, each in times.items()}


def _calls(contender: Contender) -> int:
  _seconds(contender, 3)
  return max(1, round(ENOUGH / _seconds(contender, 3)))


def _seconds(contender: Contender, calls: int) -> float:
  call, wait = contender
  start = time.perf_counter()
  for _ in range(calls):
    last = call()
  wait(last)
  return (time.perf_counter() - start) / calls


def matmul_peak(size: int) -> float:
  """FLOP/s of a bfloat16 product of square random matrices."""
  a, b = (jax.random.normal(jax.random.key(n), (size, size), jnp.bfloat16) for n in range(2))
  call = jax.jit(jnp.matmul)
  times = medians({"matmul": (lambda: call(a, b), jax.block_until_ready)})
  return 2 * size**3 / times["matmul"]


def work(length: int, causal: bool, backward: bool) -> float:
  """FLOPs: 4·T·S·N·H a batch row by the share of pairs seen; 2.5 times that for backward."""
  seen = (length + 1) / (2 * length) if causal else 1.0
  return 4 * TOKENS * length * MODEL * seen * (3.5 if backward else 1)


def dense(lengths: list[int], widths: tuple[int, ...], peak: float) -> Iterator[Row]:
  """Ours, cuDNN's and torch's, forward and forward + backward, as they come."""
  for width, length, causal, backward in itertools.product(
    widths, lengths, (False, True), (False, True)
  ):
    arrays = _arrays(length, width)
    mask = masks.Causal() if causal else masks.Full()
    contenders = {by: _bound(arrays, mask, by, backward) for by in ("gpu", "cudnn")}
    peer = _torch(arrays, causal, backward)
    times = medians(contenders | ({"torch": peer} if peer else {}))
    rate = work(length, causal, backward) / times["gpu"]
    names = {"width": width, "length": length, "causal": causal, "backward": backward}
    row = names | {"TFLOP/s": rate / 1e12, "of matmul": rate / peak}
    yield row | {f"× {by}": times[by] / times["gpu"] for by in times if by != "gpu"}


def sparse(lengths: list[int], width: int) -> Iterator[Row]:
  """How much faster than without a mask, beside how many fewer tiles, as they come."""
  for length, backward in itertools.product(lengths, (False, True)):
    arrays = _arrays(length, width)
    kinds = patterns(length)
    contenders = {name: _bound(arrays, mask, "gpu", backward) for name, mask in kinds.items()}
    times = medians(contenders | {"full": _bound(arrays, masks.Full(), "gpu", backward)})
    for name, mask in kinds.items():
      names = {"mask": name, "length": length, "backward": backward}
      yield names | {"faster": times["full"] / times[name], "tiles": fewer(mask, length, width)}


def patterns(length: int) -> dict[str, masks.Mask]:
  """A window, BigBird and Longformer."""
  return {
    "window": masks.SlidingWindow(1023, 0),
    "bigbird": masks.bigbird(jax.random.key(0), length),
    "longformer": masks.longformer(512, 1),
  }


def fewer(mask: masks.Mask, length: int, width: int) -> float:
  """All tiles over those of the forward kernel that the mask visits."""
  size = choose("gpu", jnp.bfloat16, width, length, length).forward
  tiles = mask.blocks(length, length, size.queries, size.keys).rows
  return -(-length // size.queries) * -(-length // size.keys) / tiles.visited


def _arrays(length: int, width: int) -> list[jax.Array]:
  """Query, key, value and the cotangent of the output."""
  shape = (TOKENS // length, length, MODEL // width, width)
  return [
    jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4)
  ]


def _bound(arrays: list[jax.Array], mask: masks.Mask, by: str, backward: bool) -> Contender:
  attention = functools.partial(attend, mask=mask, implementation=by)

  def both(q, k, v, cotangent):
    out, pull = jax.vjp(attention, q, k, v)
    return out, pull(cotangent)

  compiled = jax.jit(both if backward else lambda q, k, v, _: attention(q, k, v))
  return lambda: compiled(*arrays), jax.block_until_ready


def _torch(arrays: list[jax.Array], causal: bool, backward: bool) -> Contender | None:
  """torch's flash attention on the same arrays, or None without torch for this GPU."""
  try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
  except ModuleNotFoundError:
    return None
  if not torch.cuda.is_available():
    return None
  q, k, v, cotangent = (
    torch.from_dlpack(x).transpose(1, 2).contiguous().requires_grad_(backward) for x in arrays
  )

  def call():
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
      out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return torch.autograd.grad(out, (q, k, v), cotangent) if backward else out

  return call, lambda _: torch.cuda.synchronize()
