"""Times tile sizes of the grouped products' kernels on the device that is here.

    python -m scripts.checks.tune_grouped --product=bfloat16-2048-array-4096-8-8192

Each kernel runs alone; `ragged` is `jax.lax.ragged_dot`. What does not compile, or needs more
memory than there is, is left out. The last line is a row for the table of `grouped_matmul.sizes`.
`--interpret` tries one small size on any machine.
"""

import concurrent.futures
import functools
import itertools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from effjax.kernels.grouped_matmul.sizes import Size
from scripts.checks import grouped
from scripts.checks.gpu_times import compiled, medians
from scripts.checks.interpret import INTERPRET

PRODUCT = flags.DEFINE_string("product", "bfloat16-2048-array-4096-8-8192", "See `grouped.Case`.")
GRIDS = {
  "gpu": [(64, 128, 256), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4)],
  "tpu": [(256, 512), (256, 512, 1024), (128, 256)],
}
_SMALL = Size(16, 32, 16)


def timed(
  case: grouped.Case, product: str, platform: str, sizes: Iterable[Size], interpret: bool
) -> dict[Any, float]:
  """Seconds of each size that runs, and of "ragged" where the matrices are arrays."""
  given = case.draw(product)
  programs: dict[Any, tuple[Callable, Any]] = {
    size: (grouped.program(case, product, platform, interpret, size), given) for size in sizes
  }
  if case.format == "array":
    programs["ragged"] = grouped.ragged(product), given
  ready = compiled(programs)
  concurrent.futures.wait(ready.values())
  found = {}
  for name, future in ready.items():
    try:
      call = functools.partial(future.result(), *given)
      found[name] = medians({"": (call, jax.block_until_ready)}, rounds=3)[""]
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
      print(f"{product} {name}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
  return found


def best(times: list[dict[Any, float]]) -> Size:
  """The size that takes the least in all of several tables of times."""
  sizes = [size for size in times[0] if isinstance(size, Size) and all(size in x for x in times)]
  if not sizes:
    sys.exit("error: no size runs")
  return min(sizes, key=lambda size: sum(x[size] for x in times))


def main(_) -> None:
  platform = "gpu" if INTERPRET.value else jax.default_backend()
  if platform not in GRIDS:
    sys.exit("error: neither a GPU nor a TPU here; see --interpret")
  case, grid = grouped.Case.of(PRODUCT.value), itertools.product(*GRIDS[platform])
  sizes = [_SMALL] if INTERPRET.value else [Size(*x) for x in grid]
  times = {}
  for product in case.products:
    times[product] = timed(case, product, platform, sizes, INTERPRET.value)
    for name, seconds in sorted(times[product].items(), key=lambda pair: pair[1]):
      print(f"{product:9s}{name!s:70s}{seconds * 1e3:9.3f} ms", flush=True)
  products = best([times[name] for name in case.products if name != "sums"])
  sums = best([times["sums"]]) if "sums" in times else products
  row = jax.devices()[0].device_kind, jnp.dtype(case.dtype).itemsize, case.rows // case.groups
  print(f"({', '.join(map(repr, row))}, Sizes({products}, {sums})),")


if __name__ == "__main__":
  app.run(main)
