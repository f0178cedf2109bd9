"""What a program of a TPU's kernel has, and how kernels are called."""

import functools
import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effjax.core import numerics
from effjax.core.typing import Array
from effjax.kernels.flash_attention.fused import steps, walks
from effjax.kernels.flash_attention.fused.jobs import Job
from effjax.kernels.flash_attention.fused.routes import Route

_WHOLE = pl.BlockSpec(memory_space=pl.ANY)
# Functions that put values where they are summed, and the values.
Found = Iterable[tuple[Callable[..., None], tuple[Array, ...]]]


class Step:
  """What a program has to do."""

  def __init__(self, job: Job, route: Route, lists: tuple[Any, ...]):
    self.job, self.route, self._lists = job, route, lists
    self.ids = tuple(pl.program_id(axis) for axis in range(len(route.grid)))
    self.repeat = self.ids[-1]
    self.kind = (
      lists[2][route.entry(*self.ids)] if lists else walks.PARTIAL | walks.FIRST | walks.LAST
    )
    self.first = self.kind & walks.FIRST != 0
    self.last = self.kind & walks.LAST != 0
    if not route.apart:
      self.first &= self.repeat == 0
      self.last &= self.repeat == route.repeats - 1

  def at(self, kind: str, ids: tuple[Any, ...] | None = None) -> Any:
    """The block of an axis of that kind."""
    return self.route.axes[kind][1](*(ids or self.ids), *self._lists)

  def visit(self, tile: Callable[[tuple[bool, bool]], Found]) -> None:
    """Puts what `tile((masked, exact))` finds if there is a tile to visit.

    Where something may be hidden, and what the tile gives is not finite, as 0 · NaN is not, what it
    gives exactly.
    """

    def store(found: Found) -> None:
      for put, values in found:
        put(*values)

    def visit(masked: bool) -> None:
      found = tile((masked, False))
      if not (masked or self.job.adds):
        store(found)
        return
      found = list(found)
      good = steps.finite(*(x for _, values in found for x in values))
      pl.when(good)(lambda: store(found))
      pl.when(~good)(lambda: store(tile((masked, True))))

    for flag, present in ((walks.FULL, self.job.any_full), (walks.PARTIAL, self.job.any_partial)):
      if present:
        pl.when(self.kind & flag != 0)(functools.partial(visit, flag == walks.PARTIAL))

  def scores(
    self, x: Any, a: Array, b: Array, bias: Array | None, how: tuple[bool, bool], start: int = 0
  ) -> tuple[Array, Array | None, steps.Shown]:
    """As `Job.scores`, of the rows of a tile from `start` on that are in `a`."""
    job, axis = self.job, int(self.route.keys_across)
    queries = keys = at = None
    if how[0] or job.term is not None:
      shape = a.shape[0], b.shape[0]
      part = slice(start, start + shape[0])
      whole = lambda tree: jax.tree.map(lambda ref: jnp.broadcast_to(ref[...], shape), tree)
      rows = lambda tree: jax.tree.map(lambda ref: jnp.broadcast_to(ref[part, :], shape), tree)
      queries, keys = (rows(x.queries), whole(x.keys)) if axis else (whole(x.queries), rows(x.keys))
      first = self.at("k") * job.size.keys + (0 if axis else start)
      at = first + lax.broadcasted_iota(jnp.int32, shape, axis)
    cap = None if x.cap is None else x.cap[...]
    return job.scores(a, b, queries, keys, at, self._line(x, a.shape[0], start), bias, cap, how)

  def _line(self, x: Any, rows: int, first: int) -> Callable[[Array, Array], Any]:
    """A function that gives the rows' entries of the lines, which lie on a tile's diagonals."""
    size = self.job.size
    along, across = (self.at("q"), size.queries), (self.at("k"), size.keys)
    if not self.route.keys_across:
      along, across = across, along
    (i, whole), (j, columns) = along, across
    tiles = self.job.tiles[0 if self.route.keys_across else 1]

    def tile(ref):
      start = j * columns - i * whole + tiles * whole - first - rows
      start = pl.multiple_of(start, math.gcd(rows, columns))
      part = jnp.broadcast_to(ref[:, pl.ds(start, rows + columns)], (rows, rows + columns))
      return pltpu.roll(part, columns + 1, 1, stride=1, stride_axis=0)[:, :columns]

    return lambda q, k: jax.tree.map(tile, x.line)


def call(
  job: Job,
  kernel: Callable[..., None],
  route: Route,
  results: tuple[tuple[str | None, tuple[int, ...], Any], ...],
  scratch: list[Any],
) -> tuple[Array, ...]:
  """Runs `kernel(step, operands, *results, *scratch)`; an operand there is not is None.

  Args:
    results: kinds of axes, shape and type of each; one without kinds begins as zeros in main
      memory, where the kernel copies from and to.
  """
  operands, kinds = _operands(job, route.keys_across)
  lists = () if route.walk is None else route.walk.arrays
  spec = lambda shape, kinds: _WHOLE if kinds is None else route.spec(shape, kinds)
  zeros = {
    n: numerics.vary_alike(jnp.zeros(shape, dtype), operands)
    for n, (kinds, shape, dtype) in enumerate(results)
    if kinds is None
  }
  place = lambda name: jax.tree.map(lambda x: spec(x.shape, kinds[name]), operands[name])

  def body(*refs):
    listed, (_, x, *rest) = refs[: len(lists)], refs[len(lists) :]
    kernel(Step(job, route, listed), SimpleNamespace(**x), *rest)

  def run(traced, lists, zeros, operands):
    rest = iter(traced)
    return pl.pallas_call(
      body,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(lists),
        grid=tuple(n if isinstance(n, int) else next(rest) for n in route.grid),
        in_specs=[dict.fromkeys(zeros, _WHOLE), {name: place(name) for name in operands}],
        out_specs=[spec(shape, kinds) for kinds, shape, _ in results],
        scratch_shapes=scratch,
      ),
      out_shape=[job.settings.result(shape, dtype, job.query) for _, shape, dtype in results],
      input_output_aliases={len(lists) + i: n for i, n in enumerate(zeros)},
      name=kernel.__qualname__.split(".")[0].lstrip("_"),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=(pltpu.PARALLEL,) * 2 + (pltpu.ARBITRARY,) * (len(route.grid) - 2)
      ),
      interpret=job.settings.interpret,
    )(*lists, zeros, operands)

  traced = tuple(n for n in route.grid if not isinstance(n, int))
  # Blocks of an array in main memory are the whole of it, which a mapped axis would cut.
  run = jax.custom_batching.sequential_vmap(run) if zeros else run
  return job.settings.run(run, traced, lists, zeros, operands)


def _operands(job: Job, keys_across: bool) -> tuple[dict[str, Any], dict[str, str]]:
  """Arrays with heads before lengths, features laid along or across a tile; and their kinds.

  What goes with rows, the maximum, log₂ of the sum and delta, is one array [B, N, 3, T]: each array
  costs a program the time to see to its copies.
  """
  heads_first = dict.fromkeys(("query", "d_out"), "bgqh")
  heads_first |= dict.fromkeys(("key", "value"), "bmkh")
  along, across = np.s_[..., None], np.s_[:, :, None]
  queries, keys = (along, across) if keys_across else (across, along)
  place = lambda tree, at: jax.tree.map(lambda x: x[at], tree)
  # Row r of a tile begins r entries earlier in a line: of keys across the greatest distance first.
  turn = lambda x: jnp.pad(x[..., ::-1] if keys_across else x, ((0, 0), (0, 0), (0, 1)))[:, :, None]
  operands = {"bias": job.bias, "line": jax.tree.map(turn, job.line), "cap": job.cap}
  operands |= {
    name: jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), getattr(job, name)) for name in heads_first
  }
  lines = [job.lines[name] for name in ("top", "log_sum", "delta") if job.lines]
  operands["lines"] = jnp.stack(lines, 2) if lines else None
  operands |= {"queries": place(job.queries, queries), "keys": place(job.keys, keys)}
  kinds = heads_first | {"lines": "bn.q", "bias": "bnqk", "line": "bn1.", "cap": ".."}
  kinds |= {"queries": "bnq1" if keys_across else "bn1q", "keys": "bn1k" if keys_across else "bnk1"}
  return operands, kinds
