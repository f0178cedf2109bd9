"""Mixtures of experts: what routing and dispatch cost beside the products that they choose.

    scripts/bench moe --tokens=8192 --width=512 --hidden=2048 --experts=8,64 --rounds=5

Each token visits two experts, so the useful work is that of two dense feed-forward layers of their
width, "dense", whatever the number of experts. "dropless" sorts rows by expert; "capacity" gives
each expert slots, as many as the busiest one needs, so that nothing is dropped and both compute the
same; "choice" has each expert choose as many tokens as it has on average. Times are those of a
value with all gradients; contenders take turns in one process, and ratios are of medians. Then a
process of its own runs `moe_parallel`: what eight devices that split the experts hold and compute,
and what they tell one another. The last line is one JSON object.
"""

import json
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from effjax.cost.timing import interleaved, medians
from effjax.layers import MLP, Context
from effjax.moe import Capacity, ExpertChoice, MoE, TopK

TOKENS = flags.DEFINE_integer("tokens", 8192, "Tokens of a batch.")
WIDTH = flags.DEFINE_integer("width", 512, "Width D.")
HIDDEN = flags.DEFINE_integer("hidden", 2048, "Hidden width F of an expert.")
EXPERTS = flags.DEFINE_list("experts", ["8", "64"], "Numbers of experts; the first is the measure.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of interleaved timings.")

CHOICES = 2


def contender(layer: nn.Module, x: jax.Array, params):
  """A call that computes value and all gradients."""

  def loss(params, x):
    y: Any = layer.apply({"params": params}, x)
    return jnp.square(y).mean()

  program = jax.jit(jax.value_and_grad(loss, (0, 1)))
  return lambda: jax.block_until_ready(program(params, x))


def draw(layer: nn.Module, x: jax.Array):
  return jax.jit(layer.init)(jax.random.key(0), x[:, :1])["params"]


def contenders(x: jax.Array) -> dict:
  """Name → call."""
  dense, expert = MLP(CHOICES * HIDDEN.value), MLP(HIDDEN.value)
  found = {"dense": contender(dense, x, draw(dense, x))}
  for experts in map(int, EXPERTS.value):
    params = draw(MoE(TopK(experts, CHOICES), expert), x)
    routers = {
      "dropless": TopK(experts, CHOICES),
      "capacity": TopK(experts, CHOICES, capacity=enough(params["router"], experts, x)),
      "choice": ExpertChoice(experts, capacity=Capacity(CHOICES)),
    }
    for name, router in routers.items():
      found[f"{name}_{experts}"] = contender(MoE(router, expert), x, params)
  return found


def enough(params, experts: int, x: jax.Array) -> Capacity:
  """The least capacity, in hundredths of the mean load, at which nothing is dropped."""
  routing: Any = TopK(experts, CHOICES).apply({"params": params}, x[0], Context(), None)
  load = np.bincount(np.asarray(routing.experts).reshape(-1), minlength=experts)
  factor = float(np.ceil(100 * load.max() / load.mean()) / 100)
  return Capacity(factor, evaluation=factor)


def on_devices() -> dict[str, float]:
  """What `moe_parallel` finds, its table printed."""
  command = [sys.executable, "-m", "scripts.benchmarks.moe_parallel"]
  lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
  print(*lines[:-1], sep="\n", flush=True)
  return json.loads(lines[-1])


def main(_) -> None:
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(1, TOKENS.value, WIDTH.value)), jnp.float32)
  seconds = medians(interleaved(contenders(x), ROUNDS.value))
  first, found = EXPERTS.value[0], {}
  for name, taken in seconds.items():
    way, *_ = name.split("_")
    over_dense = taken / seconds["dense"]
    found[f"{name}_over_dense"] = round(over_dense, 3)
    if name != "dense":
      found[f"{name}_over_{first}"] = round(taken / seconds[f"{way}_{first}"], 3)
    print(f"{name:14} {taken:7.3f} s  {over_dense:6.3f} of dense", flush=True)
  found = {name: ratio for name, ratio in found.items() if name != "dense_over_dense"}
  print(json.dumps(found | on_devices()))


if __name__ == "__main__":
  app.run(main)
