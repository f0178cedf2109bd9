"""Attention in tiles against jax.nn.dot_product_attention and torch: time, memory, a narrow window.

    python -m scripts.benchmarks.attention --lengths=1024,4096,8192 --rounds=5

One batch row, causal, forward and forward + backward. Contenders take turns in one process; times
and ratios, ours / the other's, are of medians and of the least times: a host that moves a virtual
machine's cores apart slows XLA, whose cores work on one tile together, and torch's little.
A contender that takes over 8 seconds is timed once.
Memory is what the compiled forward + backward holds beside its arguments and results, and the
exponent e of its growth as N^e. Sparse patterns at the pattern length are compared with dense
attention by the time for a visited pair, a pair of a tile that is not empty. The last line is one
JSON object.
"""

import json
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from effjax import cost
from effjax.attention import attend
from effjax.attention.masks import Causal, Full, Mask, SlidingWindow, bigbird
from effjax.cost.timing import interleaved, medians
from effjax.kernels.flash_attention.tiles import choose

LENGTHS = flags.DEFINE_list("lengths", ["1024", "4096", "8192"], "Sequence lengths.")
HEADS = flags.DEFINE_integer("heads", 8, "Heads.")
WIDTH = flags.DEFINE_integer("width", 64, "Head width.")
DTYPES = flags.DEFINE_list("dtypes", ["float32"], "Types: float32, bfloat16.")
WINDOW = flags.DEFINE_integer("window", 256, "Keys before its own that a windowed query sees.")
PATTERN_LENGTH = flags.DEFINE_integer("pattern_length", 16384, "Length of the sparse patterns.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of interleaved timings.")
PATIENCE = 8.0  # seconds: a contender slower than this is timed once

Contenders = dict[str, Callable[[], object]]
Summaries = dict[str, dict[str, float]]  # "median" and "least" seconds of each contender


def inputs(length: int, dtype: str) -> list[jax.Array]:
  """Query, key, value and the cotangent of the output, [1, length, heads, width]."""
  keys = jax.random.split(jax.random.key(0), 4)
  shape = (1, length, HEADS.value, WIDTH.value)
  return [jax.random.normal(key, shape, dtype) for key in keys]


def tiled(mask: Mask) -> Callable:
  """Our attention through `mask`."""
  return lambda q, k, v: attend(q, k, v, mask=mask, implementation="xla")


def plain(q, k, v):
  """jax.nn's."""
  return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


def with_backward(function: Callable) -> Callable:
  """The function and the gradients of its three arguments."""

  def both(q, k, v, cotangent):
    out, backward = jax.vjp(function, q, k, v)
    return out, backward(cotangent)

  return both


def bound(function: Callable, arrays: list[jax.Array], backward: bool) -> Callable:
  """A call of the compiled function that waits for its result."""
  compiled = jax.jit(with_backward(function) if backward else function)
  arguments = arrays if backward else arrays[:3]
  return lambda: jax.block_until_ready(compiled(*arguments))


def torch_attention(arrays: list[jax.Array], backward: bool) -> Callable | None:
  """torch's scaled_dot_product_attention on the same arrays, or None without torch."""
  try:
    import torch
  except ModuleNotFoundError:
    return None
  kind = getattr(torch, str(arrays[0].dtype))
  q, k, v, cotangent = (
    torch.tensor(np.array(x.astype(jnp.float32))).transpose(1, 2).contiguous().to(kind)
    for x in arrays
  )

  def call():
    leaves = [x.detach().requires_grad_(backward) for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
    if backward:
      out.backward(cotangent)

  return call


def timed(contenders: Contenders) -> Summaries:
  """The median and the least time of each contender."""
  times = interleaved(contenders, ROUNDS.value, patience=PATIENCE)
  least = {name: min(seconds) for name, seconds in times.items()}
  return {"median": medians(times), "least": least}


def peers(length: int, dtype: str, backward: bool) -> Summaries:
  """Times of ours and the peers."""
  arrays = inputs(length, dtype)
  contenders = {"effjax": bound(tiled(Causal()), arrays, backward)}
  peer = torch_attention(arrays, backward)
  if peer is not None:
    contenders["torch"] = peer
  contenders["jax.nn"] = bound(plain, arrays, backward)
  return timed(contenders)


def windowed(length: int, backward: bool) -> Summaries:
  """Times through a window and dense, in tiles."""
  arrays = inputs(length, "float32")
  kinds = {"window": SlidingWindow(WINDOW.value, 0), "causal": Causal(), "full": Full()}
  return timed({name: bound(tiled(mask), arrays, backward) for name, mask in kinds.items()})


def patterns(length: int, backward: bool) -> Summaries:
  """Seconds for a visited pair and head: dense, through a window, and BigBird."""
  arrays = inputs(length, "float32")
  kinds = {
    "dense": Full(),
    "window": SlidingWindow(WINDOW.value, WINDOW.value),
    "bigbird": bigbird(jax.random.key(0), length),
  }
  found = timed({name: bound(tiled(mask), arrays, backward) for name, mask in kinds.items()})
  pairs = {name: visited(mask, length) for name, mask in kinds.items()}
  return {kind: {n: t / pairs[n] for n, t in times.items()} for kind, times in found.items()}


def visited(mask: Mask, length: int) -> int:
  """Pairs in the tiles that are not empty, for each head, padding included."""
  tiles = choose(1, length, length, HEADS.value, 1, mask)
  blocks = mask.blocks(length, length, tiles.queries, tiles.keys)
  return blocks.rows.visited * tiles.queries * tiles.keys


def temporaries(function: Callable, length: int) -> int:
  """Bytes the compiled forward + backward holds beside arguments and results."""
  arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(length, "float32")]
  return cost.compiled(with_backward(function), *arrays).temporaries


def row(label: str, cells: dict[str, float], unit: float = 1e3) -> None:
  print(f"{label:36s}" + "".join(f"{name:>9s} {x * unit:9.1f}" for name, x in cells.items()))


def rows(label: str, found: Summaries, unit: float = 1e3) -> None:
  for kind, cells in found.items():
    row(f"{label} {kind}", cells, unit)


def ratios(name: str, found: Summaries, one: str, other: str) -> dict[str, float]:
  """one / other under `name`: of medians, and of the least times."""
  endings = {"median": "", "least": "_least"}
  return {f"{name}{endings[k]}": round(x[one] / x[other], 3) for k, x in found.items()}


def main(_):
  lengths = [int(x) for x in LENGTHS.value]
  result = {"device": jax.default_backend(), "jax": jax.__version__}
  print("Time, ms (causal)")
  jax_nn = {}
  for dtype in DTYPES.value:
    for length in lengths:
      for backward in (False, True):
        name = f"{dtype}_{length}_{'forward_backward' if backward else 'forward'}"
        found = peers(length, dtype, backward)
        jax_nn[name] = {kind: times["jax.nn"] for kind, times in found.items()}
        rows(name, found)
        for other in found["median"].keys() - {"effjax"}:
          result |= ratios(f"{name}_over_{other}", found, "effjax", other)
  if torch_attention(inputs(8, "float32"), False) is None:
    print("torch is not installed here: no comparison with it (it comes with Python 3.11)")

  longest = lengths[-1]
  print(f"Window of {WINDOW.value} at {longest}, ms")
  for backward in (False, True):
    name = f"{longest}_{'forward_backward' if backward else 'forward'}"
    found = windowed(longest, backward)
    for kind, times in found.items():
      times["jax.nn"] = jax_nn.get(f"float32_{name}", {}).get(kind, math.nan)
    rows(f"window_{name}", found)
    for dense in ("causal", "full", "jax.nn"):
      result |= ratios(f"window_{name}_faster_than_{dense}", found, dense, "window")

  print(f"Time for a visited pair at {PATTERN_LENGTH.value}, ps")
  for backward in (False, True):
    name = "forward_backward" if backward else "forward"
    found = patterns(PATTERN_LENGTH.value, backward)
    rows(name, found, 1e12)
    for kind in found["median"].keys() - {"dense"}:
      result |= ratios(f"{kind}_{name}_pair_over_dense", found, kind, "dense")

  print("Temporaries of forward + backward, MiB")
  for name, function in (("effjax", tiled(Causal())), ("jax.nn", plain)):
    sizes = [temporaries(function, length) for length in lengths]
    row(name, dict(zip(map(str, lengths), sizes, strict=True)), 2**-20)
    if len(lengths) > 1:
      growth = math.log(sizes[-1] / sizes[0]) / math.log(lengths[-1] / lengths[0])
      result[f"memory_exponent_{name}"] = round(growth, 3)
    result[f"memory_bytes_{name}"] = sizes[-1]
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
