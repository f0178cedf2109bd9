"""Times tile sizes of the fused kernels on the device that is here.

    python -m scripts.checks.tune --case=bfloat16-128-causal

Each kernel runs alone. A size that does not compile, or needs more memory than there is, is left
out. The last line is a row for the table of `flash_attention.fused.sizes`. `--interpret` tries one
small size on any machine.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from effjax.kernels.flash_attention.fused.sizes import Size, Sizes
from scripts.checks.alone import KERNELS, LENGTH, Case, program
from scripts.checks.gpu_times import compiled, medians
from scripts.checks.interpret import INTERPRET

CASE = flags.DEFINE_string("case", "bfloat16-64-causal", "Type, head width and mask.")
GRIDS = {
  "gpu": [(32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)],
  "tpu": [(256, 512, 1024), (256, 512, 1024, 2048)],
}


def candidates(platform: str, interpret: bool) -> list[Size]:
  """The sizes to try."""
  return [Size(16, 16)] if interpret else [Size(*x) for x in itertools.product(*GRIDS[platform])]


def timed(case: Case, kernel: str, platform: str, interpret: bool) -> Iterator[tuple[float, Size]]:
  """Seconds and size of each candidate that runs."""
  arguments = case.draw(kernel, 32 if interpret else LENGTH)

  def run(size: Size, *arguments: Any) -> Any:
    return program(case, kernel, platform, Sizes(size, size, size), interpret)(*arguments)

  sizes = candidates(platform, interpret)
  ready = compiled({size: (functools.partial(run, size), arguments) for size in sizes})
  concurrent.futures.wait(ready.values())
  for size, future in ready.items():
    try:
      call = functools.partial(future.result(), *arguments)
      yield medians({"": (call, jax.block_until_ready)}, rounds=3)[""], size
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
      print(f"{kernel} {_shown(size)}: {str(error).splitlines()[0][:100]}", file=sys.stderr)


def best(case: Case, kernel: str, platform: str, interpret: bool) -> Size:
  """The fastest; prints all, fastest first."""
  found = sorted(timed(case, kernel, platform, interpret), key=lambda pair: pair[0])
  if not found:
    sys.exit(f"error: no candidate for {kernel} runs")
  for seconds, size in found:
    print(f"{kernel:9s}{_shown(size):26s}{seconds * 1e3:9.3f} ms")
  return found[0][1]


def _shown(size: Size) -> str:
  given = (x for x in dataclasses.astuple(size) if x is not None)
  return f"Size({', '.join(map(str, given))})"


def main(_) -> None:
  platform = "gpu" if INTERPRET.value else jax.default_backend()
  if platform not in GRIDS:
    sys.exit("error: neither a GPU nor a TPU here; see --interpret")
  case = Case.of(CASE.value)
  sizes = [best(case, kernel, platform, INTERPRET.value) for kernel in KERNELS]
  device = jax.devices()[0].device_kind
  row = f'("{device}", {jnp.dtype(case.dtype).itemsize}, {case.width}, '
  print(f"{row}Sizes({', '.join(map(_shown, sizes))})),")


if __name__ == "__main__":
  app.run(main)
