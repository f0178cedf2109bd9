"""Mixtures of experts: what routing and dispatch cost beside the products that they choose.

    scripts/bench moe --tokens=8192 --width=512 --hidden=2048 --experts=8,64 --rounds=5

Each token visits two experts, so the useful work is that of two dense feed-forward layers of their
width, "dense", whatever the number of experts. "dropless" sorts rows by expert; "capacity" gives
each expert as many slots as the busiest has rows, by a router that promises it, so that nothing is
dropped and both compute the same. Times are those of a value with all gradients; contenders take
turns in one process, and ratios are of medians. Then a process of its own runs `moe_parallel`:
what eight devices that split the experts hold and compute, and what they tell one another. The last
line is one JSON object.
"""

import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from effjax.cost.timing import interleaved, medians
from effjax.layers import MLP
from effjax.moe import MoE, TopK

TOKENS = flags.DEFINE_integer("tokens", 8192, "Tokens of a batch.")
WIDTH = flags.DEFINE_integer("width", 512, "Width D.")
HIDDEN = flags.DEFINE_integer("hidden", 2048, "Hidden width F of an expert.")
EXPERTS = flags.DEFINE_list("experts", ["8", "64"], "Numbers of experts, the first to compare with.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of interleaved timings.")

CHOICES = 2


class Promising(nn.Module):
  """A router that promises what it happens to keep: no expert has more rows than `capacity`."""

  router: TopK
  capacity: int

  @nn.compact
  def __call__(self, *given):
    return self.router(*given).replace(capacity=self.capacity)

  experts = property(lambda self: self.router.experts)
