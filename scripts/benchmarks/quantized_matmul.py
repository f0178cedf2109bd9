"""Products with one matrix in each representation against float32's, in turn in one process.

    python -m scripts.benchmarks.quantized_matmul --rows=1,8,128

A chain of products with pairs of matrices [D, F] and [F, D], enough of them that they come from
memory, stacked and scanned over as a model's layers are. For each number of rows: microseconds a
product; what compiled temporaries are of the packed bytes, the activations' own not counted. The
last line is one JSON object of ratios to float32's speed.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from effjax.core import linear, trees
from effjax.cost.compiled import compiled
from effjax.cost.timing import interleaved, medians
from effjax.quant import quantize

WIDTHS = flags.DEFINE_list("widths", ["576", "1536"], "D and F.")
LAYERS = flags.DEFINE_integer("layers", 30, "Pairs of matrices.")
ROWS = flags.DEFINE_list("rows", ["1", "8", "128"], "Rows of x.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of interleaved timings.")
METHODS = flags.DEFINE_list(
  "methods",
  ["float32", "int8", "int8dynamic", "int4", "nf4", "fp4", "gguf", "palette"],
  "Which to time.",
)


@jax.jit
def chain(x: jax.Array, layers: Any) -> jax.Array:
  """What is left of x after all layers."""

  def layer(x, pair):
    for name in ("up", "down"):
      x = jnp.tanh(linear(x, pair[name]["kernel"]))
    return x, None

  return jax.lax.scan(layer, x, layers)[0]


def main(_) -> None:
  D, F = map(int, WIDTHS.value)
  up, down = jax.random.split(jax.random.key(0))
  draw = lambda key, *shape: jax.random.normal(key, (LAYERS.value, *shape)) * shape[0] ** -0.5
  plain = {"up": {"kernel": draw(up, D, F)}, "down": {"kernel": draw(down, F, D)}}
  made = {m: plain if m == "float32" else quantize(plain, m) for m in METHODS.value}
  result: dict[str, Any] = {"jax": jax.__version__}
  for rows in map(int, ROWS.value):
    x = jax.random.normal(jax.random.key(1), (rows, D))
    calls = {
      name: lambda layers=layers, x=x: jax.block_until_ready(chain(x, layers))
      for name, layers in made.items()
    }
    seconds = medians(interleaved(calls, ROUNDS.value))
    print(f"{rows} rows{'':8}{'µs':>10}{'x float32':>12}{'MB':>8}{'temporaries':>14}")
    for name, layers in made.items():
      size = trees.nbytes(layers)
      held = compiled(chain, x, layers).temporaries or 0
      share = max(0, held - 8 * rows * (D + F)) / size
      ratio = seconds["float32"] / seconds[name] if "float32" in seconds else float("nan")
      each = seconds[name] / (2 * LAYERS.value) * 1e6
      print(f"{name:14}{each:10.1f}{ratio:12.2f}{size / 1e6:8.1f}{share:14.1%}", flush=True)
      result[f"{name}-{rows}"] = {"x_float32": round(ratio, 3), "temporaries": round(share, 4)}
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
