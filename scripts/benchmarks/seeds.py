"""Training speed of the lab: all seeds in one program, against one after another.

    scripts/bench seeds --rung=0.2M --seeds=4 --rounds=5

Both train the dense model of a rung on the same random tokens by the lab's own program, a call of
several steps in turn, and the ratio is the median over rounds. The last line is one JSON object;
"throughput_ratio" is together / one after another, "together_gflops" the FLOPs a second of the
matrix products, forward and backward.
"""

import json
import statistics

import jax
import numpy as np
from absl import app, flags

from effjax import cost
from effjax.cost.timing import interleaved
from effjax.train import next_token
from experiments.lab import training
from experiments.lab.sizes import LADDER, Rung
from experiments.lab.subject import fresh

RUNG = flags.DEFINE_enum("rung", "0.2M", [rung.name for rung in LADDER], "Size of the model.")
SEEDS = flags.DEFINE_integer("seeds", 4, "Models that are trained.")
STEPS = flags.DEFINE_integer("steps", 4, "Steps of a call.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of interleaved calls.")


def call_for(rung: Rung, seeds: list[int]):
  """A function that takes `STEPS` steps with these seeds."""
  subject = fresh(rung.config(), seeds)
  program = training.program(next_token(subject.module), STEPS.value, seeds)
  carried = [training.start(subject.params, [1e-3] * len(seeds), STEPS.value)]
  shape = (STEPS.value, len(seeds), rung.batch, rung.length)
  tokens = np.random.default_rng(0).integers(0, rung.vocab, shape, np.int32)
  batch = {"tokens": tokens, "targets": tokens, "weights": np.ones(shape, np.float32)}
  batch |= {"segment_ids": np.zeros(shape, np.int32), "count": np.array(STEPS.value, np.int32)}

  def take() -> None:
    carried[0], metrics = program(carried[0], batch, jax.random.key(0))
    float(metrics["loss"])

  return take


def main(_) -> None:
  training.use_every_core()
  rung = next(rung for rung in LADDER if rung.name == RUNG.value)
  seeds = list(range(SEEDS.value))
  together, alone = call_for(rung, seeds), call_for(rung, seeds[:1])

  def in_turn() -> None:
    for _ in seeds:
      alone()

  times = interleaved({"together": together, "in turn": in_turn}, ROUNDS.value, pause=0.2)
  ratios = [b / a for a, b in zip(*times.values(), strict=True)]
  tokens = STEPS.value * len(seeds) * rung.batch * rung.length
  flops = 3 * cost.flops(rung.config(), rung.length) * tokens
  seconds = statistics.median(times["together"])
  figures = {
    "rung": rung.name,
    "seeds": len(seeds),
    "throughput_ratio": round(statistics.median(ratios), 3),
    "together_tokens_per_second": round(tokens / seconds),
    "together_gflops": round(flops / seconds / 1e9, 1),
  }
  print(json.dumps(figures))


if __name__ == "__main__":
  app.run(main)
