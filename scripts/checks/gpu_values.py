"""Values of attention's implementations, with gradients, and of grouped products, against float64.

Kernels have their own tile sizes. `gpu.py` starts it as a process that answers the name of a
problem with its rows.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from effjax.attention import masks
from effjax.attention.scores import ALiBi, RelativeBias
from effjax.kernels.flash_attention import cases
from effjax.kernels.flash_attention.fused import cudnn
from effjax.kernels.flash_attention.fused.sizes import choose
from effjax.kernels.flash_attention.tiled.tiles import Tiles
from scripts.checks import grouped
from scripts.checks.interpret import INTERPRET
from scripts.checks.processes import Row, answer


def problems(length: int, widths: tuple[int, ...]) -> dict[str, cases.Structure]:
  """By name: every option at heads of 64, then every width and type; lengths are ragged."""
  of = functools.partial(_problem, length)
  half = length // 2 + 3
  longformer = masks.longformer(length // 8, (0, 5), causal=True)
  bigbird = lambda rng: masks.bigbird(
    jax.random.key(int(rng.integers(99))), length, block=16, number=1
  )
  options = {
    "full": of(64, mask=masks.Full()),
    "window": of(64, mask=masks.SlidingWindow(length // 4, 3)),
    "window to the left": of(64, mask=masks.SlidingWindow(length // 4, 0)),
    "fewer queries of all": of(64, mask=masks.Full(), queries=half),
    "longformer": of(64, mask=longformer),
    "bigbird": dataclasses.replace(of(64), mask=bigbird),
    "softcap": dataclasses.replace(of(64), softcap=1.5),
    "bias": dataclasses.replace(of(64), bias=(1, 4, length, length)),
    "alibi": dataclasses.replace(of(64), scores=lambda rng: ALiBi.standard(4)),
    "relative bias": dataclasses.replace(of(64), scores=_relative),
    "learned cap": dataclasses.replace(of(64), softcap=1.5, learned_cap=True),
    "segments": dataclasses.replace(of(64), segments=True),
    "positions": dataclasses.replace(of(64, queries=half), positions=True),
    "fewer queries": of(64, queries=half),
    "one token": dataclasses.replace(of(64, queries=1), positions=True, cache=True),
  }
  kinds = {f"{kind}-{width}": of(width, kind) for width in widths for kind in cases.TOLERANCE}
  return options | kinds


def _relative(rng: np.random.Generator) -> RelativeBias:
  return RelativeBias(rng.normal(size=(32, 4)).astype(np.float32))


def chosen() -> dict[str, cases.Structure]:
  """Those of the whole check, or with `--interpret` small ones."""
  return problems(45, (32,)) if INTERPRET.value else problems(1000, (32, 64, 80, 128, 256))


def _problem(
  length: int,
  width: int,
  dtype: str = "bfloat16",
  mask: Any = None,
  queries: int | None = None,
) -> cases.Structure:
  T = queries or length
  return cases.Structure(
    shape=(2, T, length, 2, 2, width, width),
    dtype=dtype,
    scale=width**-0.5,
    softcap=None,
    bias=None,
    mask=lambda rng: masks.Causal() if mask is None else mask,
    segments=False,
    positions=False,
    tiles=Tiles(1, 1, 64, 64),
    sizes=choose("gpu", dtype, width, T, length),
  )


def rows(name: str, problem: cases.Structure, interpret: bool) -> Iterator[Row]:
  """Relative errors of a problem by each implementation, as they come."""
  # XLA rounds the factors of float32 products to 11 bits on GPUs unless it is told not to.
  exact = "highest" if problem.dtype == "float32" else None
  with jax.default_matmul_precision(exact):
    yield from _compared(name, problem, np.random.default_rng([*name.encode()]), interpret)


def _compared(
  name: str, problem: cases.Structure, rng: np.random.Generator, interpret: bool
) -> Iterator[Row]:
  """The kernels come last: a process whose kernel went wrong may be good for nothing more."""
  arrays, where = problem.draw(rng)
  exact = cases.exact(**problem.options)
  if not interpret and _by_cudnn(problem, arrays, where):
    alone = [*arrays[:-1], jnp.zeros_like(arrays[-1])]  # no log-sum-exp to differentiate
    want = exact(alone, where)
    found = jax.jit(functools.partial(cases.evaluate, functools.partial(_cudnn, problem)))
    out, _, *gradients = found(alone, where)
    yield _row(name, "cudnn", problem, cases.errors((out, want[1], *gradients), want))
  want = exact(arrays, where)
  least = cases.chance(problem)(arrays, where, want[0])
  for by, run in cases.programs(problem, ("xla", "gpu"), interpret).items():
    yield _row(name, by, problem, cases.errors(run(arrays, where), want, least))


def _row(name: str, by: str, problem: cases.Structure, errors: dict[str, float]) -> Row:
  limit = cases.TOLERANCE[problem.dtype]
  good = all(error <= limit for error in errors.values())
  largest = max(errors.values())
  names = {"problem": name, "by": by, "tolerance": limit, "largest": largest, "good": good}
  return names | {"errors": errors}


def _by_cudnn(problem: cases.Structure, arrays: Any, where: Any) -> bool:
  """Whether cuDNN honours the problem."""
  query, key, value, bias = arrays[:4]
  options = problem.options | where
  return cudnn.refusal(query, key, value, return_lse=False, bias=bias, **options) is None


def _cudnn(
  problem: cases.Structure, query: Any, key: Any, value: Any, **arguments: Any
) -> tuple[Any, Any]:
  out, _ = cudnn.attention(query, key, value, **problem.options, **arguments)
  return out, jnp.zeros(out.shape[:3], jnp.float32)


def grouped_cases() -> tuple[str, ...]:
  """Those of grouped products, or with `--interpret` small ones."""
  return grouped.SMALL if INTERPRET.value else grouped.CASES


def main(_) -> None:
  found = chosen()

  def answered(job: str) -> Iterator[Row]:
    kind, name = job.split("/")
    if kind == "values":
      return rows(name, found[name], INTERPRET.value)
    case = grouped.Case.of(name)
    return (grouped.values(case, product, INTERPRET.value) for product in case.products)

  answer(answered)


if __name__ == "__main__":
  app.run(main)
