"""Which kernels multiply with a matrix that stays packed, by platform."""

import functools
from collections.abc import Callable
from typing import Any

from effjax.core import spmd
from effjax.core.typing import Array
from effjax.kernels.quantized_matmul import gpu, tpu
from effjax.kernels.quantized_matmul.batches import row_by_row
from effjax.kernels.quantized_matmul.formats import Format

KERNELS = {"cuda": gpu, "tpu": tpu}


def branches(
  format: Format, inputs: bool, x: Array, matrix: tuple[Array, tuple[Any, ...]]
) -> dict[str, Callable[..., Array]]:
  """(x, matrix) → x Mᵀ, or x M where `inputs` is False, for each platform that has a kernel for it.

  There is none where a mesh axis is explicit.
  """
  if spmd.explicit_mesh((x, matrix)) is not None:
    return {}
  fitting = {name: k for name, k in KERNELS.items() if k.fits(x, format, *matrix)}
  return {name: functools.partial(_on_rows, k, format, inputs) for name, k in fitting.items()}


def _on_rows(kernels, format, inputs, x, matrix):
  run = kernels.outputs if inputs else kernels.inputs
  mapped = row_by_row(lambda x, codes, constants: run(x, format, codes, constants))
  return spmd.map_rows(lambda x, matrix: mapped(x, *matrix), x, matrix)
