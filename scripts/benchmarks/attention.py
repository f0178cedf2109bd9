"""Attention in tiles against jax.nn.dot_product_attention and torch: time, memory, a narrow window.

    python -m scripts.benchmarks.attention --lengths=1024,4096,8192 --rounds=5

One batch row, causal, forward and forward + backward. All contenders take turns in one process, so
that each meets the machine's good and bad minutes; times and ratios, ours / the other's, are of
medians and of the least times: a host that moves a virtual machine's cores apart slows XLA, whose
cores work on one tile together, and torch little. A contender that takes over 15 seconds is timed
once.
Memory is what the compiled forward + backward holds beside its arguments and results, and the
exponent e of its growth as N^e. Sparse patterns at the pattern length are compared with dense
attention by the time for a visited pair, a pair of a tile that is not empty. ALiBi at the longest
length is compared with the same as a bias, which the program works out. The last line is one JSON
object.
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
from effjax.attention.scores import ALiBi
from effjax.cost.timing import interleaved, medians
from effjax.kernels.flash_attention.tiled.tiles import choose

LENGTHS = flags.DEFINE_list("lengths", ["1024", "4096", "8192"], "Sequence lengths.")
HEADS = flags.DEFINE_integer("heads", 8, "Heads.")
WIDTH = flags.DEFINE_integer("width", 64, "Head width.")
DTYPES = flags.DEFINE_list("dtypes", ["float32"], "Types: float32, bfloat16.")
WINDOW = flags.DEFINE_integer("window", 256, "Keys before its own that a windowed query sees.")
PATTERN_LENGTH = flags.DEFINE_integer("pattern_length", 16384, "Length of the sparse patterns.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of interleaved timings.")
ADDED = ("scores", "bias", "neither")
PATIENCE = 15.0  # seconds: a contender slower than this is timed once

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


def added(kind: str) -> Callable:
  """Ours, causal, with ALiBi "scores", the same as a "bias", or neither."""
  alibi = ALiBi.standard(HEADS.value)

  def attention(q, k, v):
    given = {"scores": alibi} if kind == "scores" else {}
    given |= {"bias": alibi.dense(q.shape[1])} if kind == "bias" else {}
    return attend(q, k, v, mask=Causal(), implementation="xla", **given)

  return attention


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


def peers(length: int, dtype: str, backward: bool) -> Contenders:
  """Ours and the peers, causal."""
  arrays = inputs(length, dtype)
  contenders = {"effjax": bound(tiled(Causal()), arrays, backward)}
  peer = torch_attention(arrays, backward)
  if peer is not None:
    contenders["torch"] = peer
  contenders["jax.nn"] = bound(plain, arrays, backward)
  return contenders


def masked(kinds: dict[str, Mask], length: int, backward: bool) -> Contenders:
  """Ours through each mask."""
  arrays = inputs(length, "float32")
  return {name: bound(tiled(mask), arrays, backward) for name, mask in kinds.items()}


def timed(groups: dict[str, Contenders]) -> dict[str, Summaries]:
  """The median and the least time of each contender of each group; all of them take turns."""
  calls = {(group, name): call for group, each in groups.items() for name, call in each.items()}
  named = {" ".join(key): call for key, call in calls.items()}
  times = interleaved(named, ROUNDS.value, patience=PATIENCE)
  kinds = {"median": medians(times), "least": {name: min(x) for name, x in times.items()}}
  return {
    group: {k: {n: x[f"{group} {n}"] for n in each} for k, x in kinds.items()}
    for group, each in groups.items()
  }


def visited(mask: Mask, length: int) -> int:
  """Pairs in the tiles that are not empty, for each head, padding included."""
  tiles = choose(1, length, length, HEADS.value, 1, mask)
  blocks = mask.blocks(length, length, tiles.queries, tiles.keys)
  return blocks.rows.visited * tiles.queries * tiles.keys


def temporaries(function: Callable, length: int) -> int:
  """Bytes the compiled forward + backward holds beside arguments and results."""
  arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(length, "float32")]
  held = cost.compiled(with_backward(function), *arrays).temporaries
  assert held is not None, "this backend does not say what it holds"
  return held


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
  longest, sparse_length = lengths[-1], PATTERN_LENGTH.value
  window = {"window": SlidingWindow(WINDOW.value, 0), "causal": Causal(), "full": Full()}
  patterns = {
    "dense": Full(),
    "window": SlidingWindow(WINDOW.value, WINDOW.value),
    "bigbird": bigbird(jax.random.key(0), sparse_length),
  }
  dense, narrow, sparse, alibi = {}, {}, {}, {}
  for direction in ("forward", "forward_backward"):
    backward = direction != "forward"
    for dtype in DTYPES.value:
      for length in lengths:
        dense[f"{dtype}_{length}_{direction}"] = peers(length, dtype, backward)
    narrow[f"{longest}_{direction}"] = masked(window, longest, backward)
    sparse[direction] = masked(patterns, sparse_length, backward)
    arrays = inputs(longest, "float32")
    alibi[f"alibi_{longest}_{direction}"] = {
      kind: bound(added(kind), arrays, backward) for kind in ADDED
    }
  found = timed(dense | narrow | sparse | alibi)

  result = {"device": jax.default_backend(), "jax": jax.__version__}
  print("Time, ms (causal)")
  for name in dense:
    rows(name, found[name])
    for other in dense[name].keys() - {"effjax"}:
      result |= ratios(f"{name}_over_{other}", found[name], "effjax", other)
  if torch_attention(inputs(8, "float32"), False) is None:
    print("torch is not installed here: no comparison with it (it comes with Python 3.11)")

  print(f"Window of {WINDOW.value} at {longest}, ms")
  for name in narrow:
    others = ["causal", "full"]
    if f"float32_{name}" in found:
      others.append("jax.nn")
      for kind, times in found[name].items():
        times["jax.nn"] = found[f"float32_{name}"][kind]["jax.nn"]
    rows(f"window_{name}", found[name])
    for other in others:
      result |= ratios(f"window_{name}_faster_than_{other}", found[name], other, "window")

  print(f"Time for a visited pair at {sparse_length}, ps")
  pairs = {name: visited(mask, sparse_length) for name, mask in patterns.items()}
  for name in sparse:
    each = {k: {n: t / pairs[n] for n, t in times.items()} for k, times in found[name].items()}
    rows(name, each, 1e12)
    for kind in ("window", "bigbird"):
      result |= ratios(f"{kind}_{name}_pair_over_dense", each, kind, "dense")

  print(f"ALiBi at {longest}, ms")
  for name in alibi:
    rows(name, found[name])
    for other in ("bias", "neither"):
      result |= ratios(f"{name}_over_{other}", found[name], "scores", other)

  print("Temporaries of forward + backward, MiB")
  sizes = {kind: temporaries(added(kind), longest) for kind in ADDED}
  row(f"alibi_{longest}", sizes, 2**-20)
  result |= {f"memory_bytes_alibi_{kind}": size for kind, size in sizes.items()}
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
