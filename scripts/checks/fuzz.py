"""Random attention problems through every implementation, against float64.

    scripts/fuzz_attention --cases 2000

Shapes, types, groups of heads, masks (composed ones, masks of heads, of the batch and of data),
segments, soft caps, biases and ragged lengths are drawn; kernels run interpreted. For values and
all gradients, ‖x − float64‖ / ‖float64‖ must stay within 2e-6 in float32, 1e-2 in bfloat16, 2e-3
in float16. Ends with a line of JSON, and with status 1 if a case failed; a failing structure is
named by a seed that draws it again.
"""

import json
import sys

import numpy as np
from absl import app, flags
from tqdm import tqdm

from scripts.checks import cases

CASES = flags.DEFINE_integer("cases", 200, "Cases.", lower_bound=1)
DRAWS = flags.DEFINE_integer("draws", 10, "Cases to a structure.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the first structure; the next ones count up.")
PLATFORMS = ("xla", "gpu", "tpu")


def fuzz(number: int, draws: int, seed: int) -> tuple[dict[str, float], list[str]]:
  """The largest error by implementation and type, and a line for each failure."""
  worst: dict[str, float] = {}
  failures = []
  with tqdm(total=number, unit="case") as bar:
    for n in range(seed, seed + -(-number // draws)):
      rng = np.random.default_rng(n)
      problem = cases.structure(rng)
      exact = cases.exact(**problem.options)
      programs = cases.programs(problem, PLATFORMS, interpret=True)
      for _ in range(min(draws, number - bar.n)):
        arrays, where = problem.draw(rng)
        want = exact(arrays, where)
        for name, run in programs.items():
          errors = cases.errors(run(arrays, where), want)
          label, error = f"{name} {problem.dtype}", max(errors.values())
          worst[label] = max(worst.get(label, 0.0), error)
          if not error <= cases.TOLERANCE[problem.dtype]:
            failures.append(f"seed {n}, {label}: {errors}; {problem}")
        bar.update()
  return worst, failures


def main(_):
  worst, failures = fuzz(CASES.value, DRAWS.value, SEED.value)
  print(*failures, sep="\n")
  print(json.dumps({"cases": CASES.value, "failures": len(failures), "largest_error": worst}))
  sys.exit(bool(failures))


if __name__ == "__main__":
  app.run(main)
