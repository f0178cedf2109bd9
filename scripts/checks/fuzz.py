"""Random attention problems through every implementation, against float64.

    scripts/fuzz_attention --cases 2000

Shapes, types, groups of heads, masks (composed ones, masks of heads, of the batch and of data),
segments, soft caps, biases, scores (of queries, keys and distances, and sums of them), caches with
slots that hold NaN, 64 bits, explicit meshes and ragged lengths are drawn; kernels run interpreted.
For values and all gradients, ‖x − float64‖ / ‖float64‖ must stay within 2e-6 in float32, 1e-2 in
bfloat16, 2e-3 in float16. Ends with a line of JSON, and with status 1 if a case failed; a failing
structure is named by a seed that draws it again.
"""

import dataclasses
import json
import sys

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from tqdm import tqdm

from effjax.attention import masks, scores
from effjax.kernels.flash_attention import cases
from effjax.kernels.flash_attention.fused.sizes import Size, Sizes
from effjax.kernels.flash_attention.tiled.tiles import Tiles

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
      problem = structure(rng)
      exact = cases.exact(**problem.options)
      chance = cases.chance(problem)
      looked_up = problem.positions and problem.scores is not None  # which TPUs cannot
      platforms = tuple(name for name in PLATFORMS if not (looked_up and name == "tpu"))
      programs = cases.programs(problem, platforms, interpret=True)
      for _ in range(min(draws, number - bar.n)):
        arrays, where = problem.draw(rng)
        want = exact(arrays, where)
        least = chance(arrays, where, want[0])
        for name, run in programs.items():
          errors = cases.errors(run(arrays, where), want, least)
          label, error = f"{name} {problem.dtype}", max(errors.values())
          worst[label] = max(worst.get(label, 0.0), error)
          if not error <= cases.TOLERANCE[problem.dtype]:
            failures.append(f"seed {n}, {label}: {errors}; {problem}")
        bar.update()
  return worst, failures


def structure(rng: np.random.Generator) -> cases.Structure:
  """A random one."""
  pick = lambda *options: options[rng.integers(len(options))]
  B, K, G = (int(rng.integers(1, n + 1)) for n in (2, 2, 3))
  S = int(rng.integers(1, 70))
  T = pick(S, int(rng.integers(1, S + 1)), int(rng.integers(1, 70)))
  positions = bool(rng.random() < 0.15)
  whole = (B, K * G, T, S)
  side = lambda: pick(16, 32, 64)
  size = lambda: Size(side(), side(), part=16)
  divisor = lambda n: pick(*(d for d in range(1, n + 1) if n % d == 0))
  heads = divisor(K)
  drawn = cases.Structure(
    shape=(B, T, S, K, G, pick(4, 8, 16, 24), pick(4, 8, 16)),
    dtype=pick("float32", "float32", "bfloat16", "float16"),
    scale=pick(0.25, 0.4),
    softcap=pick(None, None, 1.5, 20.0),
    bias=None if rng.random() < 0.5 else tuple(pick(1, n) for n in whole),
    mask=_mask(rng, whole, positions, depth=2),
    segments=bool(rng.random() < 0.3),
    positions=positions,
    tiles=Tiles(
      divisor(B) if heads == K else 1, heads, pick(8, 16, 32), pick(8, 16, 32), pick(False, True)
    ),
    sizes=Sizes(size(), size(), size()),
  )
  learned = drawn.softcap is not None and bool(rng.random() < 0.5)
  return dataclasses.replace(
    drawn,
    scores=_scores(rng, drawn.dtype, whole),
    learned_cap=learned,
    cache=positions and bool(rng.random() < 0.5),
    mode=str(rng.choice(("plain", "x64", "mesh"), p=(0.6, 0.2, 0.2))),
  )


def _mask(
  rng: np.random.Generator, whole: tuple[int, ...], positions: bool, depth: int
) -> cases.Draw:
  """A mask of one kind, or two of them joined."""
  inner = lambda: _mask(rng, whole, positions, depth - 1)
  kind = rng.integers(5) if depth else 0
  if kind < 2:
    leaves = _leaves(rng, whole, positions)
    return leaves[rng.integers(len(leaves))]
  if kind == 2:
    negated = inner()
    return lambda r: ~negated(r)
  first, second = inner(), inner()
  return (lambda r: first(r) & second(r)) if kind == 3 else (lambda r: first(r) | second(r))


def _leaves(rng: np.random.Generator, whole: tuple[int, ...], positions: bool) -> list[cases.Draw]:
  """One draw for each kind of mask that goes with the sizes."""
  B, N, T, S = whole
  number = lambda least, most: int(rng.integers(least, most + 1))
  window = masks.SlidingWindow(number(0, 40), number(0, 20))
  dilated = masks.Dilated(number(1, 6), number(2, 5))
  block = number(1, 20)
  fixed = (
    masks.Full(),
    masks.Causal(),
    window,
    dilated,
    masks.BlockWindow(number(0, 2), number(0, 2), block),
    masks.Global(number(0, min(S, 5))),
    masks.Global(tuple(number(0, S - 1) for _ in range(2))),
    masks.Prefix(number(0, S)),
    masks.Predicate(lambda q, k: (q * 3 + k) % 5 != 0),
    masks.PerHead((window, dilated), tuple(number(0, 1) for _ in range(N))),
  )
  always = lambda mask: lambda r: mask
  draws: list[cases.Draw] = [always(mask) for mask in fixed]
  integers = lambda r, low, high, *shape: r.integers(low, high, shape).astype(np.int32)
  draws.append(lambda r: masks.Prefix(integers(r, 0, S + 1, B)))
  if T <= S:
    blocks, heads, per_row = -(-S // block), (1, N)[number(0, 1)], number(1, 2)
    table = lambda r: integers(r, -1, blocks, 1, heads, blocks, per_row)
    draws.append(lambda r: masks.RandomBlocks(table(r), block))
    draws.append(lambda r: masks.Global(integers(r, -1, S, B, 2)))
    draws.append(lambda r: masks.Documents(np.sort(integers(r, -1, 4, B, S), axis=1)))
  return draws


def _scores(rng: np.random.Generator, dtype: str, whole: tuple[int, ...]) -> cases.Draw | None:
  """A score of one kind, two of them added, or none."""
  kinds = _kinds(rng, dtype, whole)
  first, second = (kinds[n] for n in rng.integers(len(kinds), size=2))
  number = rng.choice(3, p=(0.5, 0.3, 0.2))
  return (None, first, lambda r: first(r) + second(r))[number]


def _kinds(rng: np.random.Generator, dtype: str, whole: tuple[int, ...]) -> list[cases.Draw]:
  """One draw for each kind of score that goes with the sizes."""
  B, N, T, S = whole
  number = lambda least, most: int(rng.integers(least, most + 1))
  normal = lambda r, *shape: r.normal(0, 0.5, shape).astype(np.float32)
  buckets, heads, most = 2 * number(2, 8), (1, N)[number(0, 1)], number(10, 90)
  both = bool(number(0, 1))
  shapes = [
    ((1, B)[number(0, 1)], (1, N)[number(0, 1)], length)
    for length in ((1, T)[number(0, 1)], S, 2 * number(0, 30) + 1)
  ]
  told = {"heads": (1, N)[number(0, 1)], "batch": (1, B)[number(0, 1)]}

  def own(r: np.random.Generator) -> scores.Term:
    u, w, z = (normal(r, *shape) for shape in shapes)
    return scores.Term(_own, {"u": u}, {"w": w}, {"z": z}, **told)

  # A slope's gradient is a sum of distances, in half precision one of their roundings.
  slopes = (lambda r: np.abs(normal(r, N)) / 4) if dtype == "float32" else lambda r: (0.25,) * N
  return [
    lambda r: scores.ALiBi.standard(N),
    lambda r: scores.ALiBi(slopes(r)),
    lambda r: scores.RelativeBias(normal(r, buckets, heads), both, most),
    own,
  ]


def _own(q, k, u, w, z, head=0, batch=0):
  return jnp.sin(u * w) + z * u + 0.1 * (head - batch) * ((q + k) % 3)


def main(_):
  worst, failures = fuzz(CASES.value, DRAWS.value, SEED.value)
  print(*failures, sep="\n")
  print(json.dumps({"cases": CASES.value, "failures": len(failures), "largest_error": worst}))
  sys.exit(bool(failures))


if __name__ == "__main__":
  app.run(main)
