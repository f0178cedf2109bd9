"""Grouped matrix product: time against ragged_dot, a loop over experts, and one dense product.

    python -m scripts.benchmarks.grouped_matmul --experts=8,64 --rows=4096 --rounds=7

"dense" multiplies the same rows by one matrix: the useful work and no more. "loop" is an unrolled
Python loop over experts that knows the group sizes when it is compiled. Contenders take turns in
one process; ratios are of medians. The last line is one
JSON object of ratios: time of grouped_linear / time of the other, forward and with its backward.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from effjax.cost.timing import interleaved, medians
from effjax.kernels.grouped_matmul import grouped_linear

EXPERTS = flags.DEFINE_list("experts", ["8", "64"], "Numbers of experts.")
ROWS = flags.DEFINE_integer("rows", 4096, "Rows over all experts.")
WIDTHS = flags.DEFINE_list("widths", ["512", "1024"], "Columns in and out.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds of interleaved timings.")


def contenders(sizes: np.ndarray) -> dict:
  """Name → function (x, w) of the same work as the grouped product of `sizes`."""
  ends = np.cumsum(sizes)

  def loop(x, w):
    parts = zip(ends - sizes, ends, range(len(sizes)), strict=True)
    return jnp.concatenate([x[start:end] @ w[e] for start, end, e in parts])

  return {
    "grouped": lambda x, w: grouped_linear(x, w, jnp.asarray(sizes)),
    "ragged": lambda x, w: jax.lax.ragged_dot(x, w, jnp.asarray(sizes)),
    "loop": loop,
    "dense": lambda x, w: x @ w[0],
  }


def with_backward(function):
  """`function`, its value and both gradients."""
  return lambda x, w: jax.vjp(function, x, w)[1](jnp.ones((x.shape[0], w.shape[2]), x.dtype))


def ratios(functions: dict, x, w, rounds: int) -> dict[str, float]:
  """Median time of "grouped" over that of each other."""
  compiled = {name: jax.jit(function) for name, function in functions.items()}
  wait = lambda function: lambda: jax.block_until_ready(function(x, w))
  times = {name: wait(function) for name, function in compiled.items()}
  seconds = medians(interleaved(times, rounds))
  ours = seconds.pop("grouped")
  return {name: round(ours / theirs, 3) for name, theirs in seconds.items()}


def main(_) -> None:
  wide, narrow = (int(width) for width in WIDTHS.value)
  found = {}
  for experts in (int(number) for number in EXPERTS.value):
    rng = np.random.default_rng(0)
    sizes = np.bincount(rng.integers(0, experts, ROWS.value), minlength=experts).astype(np.int32)
    x = jnp.asarray(rng.normal(size=(ROWS.value, wide)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(experts, wide, narrow)), jnp.float32)
    functions = contenders(sizes)
    others = [name for name in functions if name != "ragged"]  # its backward takes minutes at 64
    backward = {name: with_backward(functions[name]) for name in others}
    for kind, table in (("forward", functions), ("forward_backward", backward)):
      for name, ratio in ratios(table, x, w, ROUNDS.value).items():
        found[f"E{experts}_{kind}_over_{name}"] = ratio
        print(f"{experts:3} experts  {kind:16}  grouped / {name:6}  {ratio:6.3f}", flush=True)
  print(json.dumps(found))


if __name__ == "__main__":
  app.run(main)
