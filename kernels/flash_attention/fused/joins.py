"""Pieces of rows put together: a kernel that reads them from their slots, 16 rows to a program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from effjax.core.typing import Array
from effjax.kernels.flash_attention.fused import steps
from effjax.kernels.flash_attention.fused.jobs import Job
from effjax.kernels.flash_attention.fused.pieces import Pieces
from effjax.kernels.flash_attention.fused.places import Place

_ROWS = 16  # of a program

Result = tuple[str, Any]  # the kinds of an array's axes, and what has its shape and type
Parts = tuple[Array, ...]  # what a piece gives of some rows, in float32


def slots(pieces: Pieces, results: tuple[Result, ...], size: int) -> tuple[Result, ...]:
  """What takes the pieces' results of `size` rows: [B, heads, slots, size, …]; none if uncut."""
  if not pieces.slots:
    return ()
  found = []
  for kinds, like in results:
    sides = dict(zip(kinds, like.shape, strict=True))
    lead = "".join(kind for kind in kinds if kind in "bnm")
    rest = [sides[kind] for kind in kinds if kind not in "bnmqk"]
    shape = (*(sides[kind] for kind in lead), pieces.slots, size, *rest)
    kinds = lead + "." * (len(shape) - len(lead))
    found.append((kinds, jax.ShapeDtypeStruct(shape, jnp.float32)))
  return tuple(found)


def joined(
  job: Job,
  pieces: Pieces,
  join: Callable[[Parts, Parts], Parts],
  results: tuple[Result, ...],
  parts: tuple[Result, ...],
  found: tuple[Array, ...],
) -> tuple[Array, ...]:
  """The whole of `results`.

  Args:
    join: two pieces of the same rows as one.
    parts: `slots` for the results.
    found: the results without the rows that are cut, then these rows' pieces in slots.
  """
  (B, heads, _, size), number = parts[0][1].shape[:4], len(results)
  cut: list[Any] = [pieces.joined, pieces.ends]

  def kernel(_, x, *outputs):
    n, at = pl.program_id(1), pl.program_id(0) * _ROWS
    row, ends = x["cut"]
    first, last = ends[n], ends[n + 1]
    load = lambda slot: tuple(ref[slot, pl.ds(at, _ROWS)] for ref in x["parts"])

    @pl.when(first < last)
    def _():
      more = lambda slot, carry: join(carry, load(slot))
      values = lax.fori_loop(first + 1, last, more, load(first))
      here = pl.ds(row[n] * size + at, _ROWS)
      for output, value in zip(outputs, values, strict=True):
        output[here] = value.astype(output.dtype)

  index = lambda axis: (None, lambda *ids: ids[axis])
  axes = {"n": index(2), "m": index(2), "b": index(3)}
  place = Place((size // _ROWS, cut[0].shape[-1], heads, B), axes)
  specs = lambda arrays: [place.spec(like.shape, kinds) for kinds, like in arrays]
  call = pl.pallas_call(
    kernel,
    grid=place.grid,
    in_specs=[specs(results), {"parts": specs(parts), "cut": specs([("bn.", x) for x in cut])}],
    out_specs=specs(results),
    out_shape=[job.settings.result(like.shape, like.dtype, job.query) for _, like in results],
    input_output_aliases={n: n for n in range(number)},
    name="joined",
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
    interpret=job.settings.interpret,
  )
  operands = {"parts": list(found[number:]), "cut": cut}
  return tuple(job.settings.run(call, list(found[:number]), operands))


def added(a: Parts, b: Parts) -> Parts:
  """Sums."""
  return tuple(x + y for x, y in zip(a, b, strict=True))


def attended(a: Parts, b: Parts, log2: float) -> Parts:
  """Output, maximum and log₂ of the sum over disjoint keys.

  Args:
    log2: how many log 2 a unit of the maximum is.
  """
  (out_a, top_a, sum_a), (out_b, top_b, sum_b) = a, b
  most = jnp.maximum(top_a, top_b)
  base = jnp.where(most == -jnp.inf, 0.0, most)
  share = lambda top, log_sum: jnp.exp2((top - base) * log2 + log_sum)
  of_a, of_b = share(top_a, sum_a), share(top_b, sum_b)
  total = steps.some(of_a + of_b)
  out = out_a * (of_a / total)[:, None] + out_b * (of_b / total)[:, None]
  return out, most, jnp.log2(total)
