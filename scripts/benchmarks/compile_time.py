"""Compile time of a training step: 30 layers against 6.

    scripts/bench compile_time --layers=6,30 --rounds=3

Equal neighbours share one compiled body, so depth should cost next to nothing. Each round traces
and compiles the step of either depth anew, without any cache; the ratio is the median over rounds
of times taken side by side. The last line is one JSON object; "compile_time_ratio" is the deeper
over the shallower.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from tqdm import tqdm

from effjax.models import Transformer, presets
from effjax.train import OptimizerConfig, init_state, make_optimizer, make_train_step, next_token

LAYERS = flags.DEFINE_list("layers", ["6", "30"], "The two depths.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds of interleaved compilations.")
WIDTH, HEADS, VOCABULARY, SHAPE = 256, 8, 4096, (2, 128)


def compile_step(layers: int) -> float:
  """Seconds to trace and compile the training step of a Llama with that many layers."""
  module = Transformer(presets.llama(VOCABULARY, WIDTH, layers, HEADS, context=SHAPE[1]))
  optimizer = make_optimizer(OptimizerConfig())
  batch = {name: jax.ShapeDtypeStruct(SHAPE, jnp.int32) for name in ("tokens", "targets")}

  def state(key):
    params = module.init(key, jnp.zeros(SHAPE, jnp.int32))["params"]
    return init_state(params, optimizer)

  abstract = jax.eval_shape(state, jax.random.key(0))
  jax.clear_caches()
  start = time.perf_counter()
  make_train_step(next_token(module), optimizer).lower(abstract, batch, jax.random.key(0)).compile()
  return time.perf_counter() - start


def main(_) -> None:
  jax.config.update("jax_enable_compilation_cache", False)
  shallow, deep = (int(layers) for layers in LAYERS.value)
  compile_step(2)  # the first compilation of a process also loads the compiler
  times: dict[int, list[float]] = {shallow: [], deep: []}
  for _ in tqdm(range(ROUNDS.value), unit="round"):
    for layers, taken in times.items():
      taken.append(compile_step(layers))
  for layers, taken in times.items():
    print(f"{layers:3} layers  {statistics.median(taken):6.2f} s")
  pairs = zip(times[deep], times[shallow], strict=True)
  found = {"compile_time_ratio": statistics.median(a / b for a, b in pairs)}
  found |= {f"seconds_{layers}": statistics.median(taken) for layers, taken in times.items()}
  print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
  app.run(main)
