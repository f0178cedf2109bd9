"""Taps: what goes into or comes out of the modules of a model, reduced as it runs.

An interceptor of Flax sows a running statistic beside each module's parameters, in scanned,
rematerialised and jitted layers too; activations are not kept unless the reduction keeps them.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct, traverse_util

from effjax.core import spmd
from effjax.core.trees import Chooser, chooses
from effjax.core.typing import Array, Int, Params, PyTree, Size
from effjax.layers.forward import forward
from effjax.layers.linear import Linear
from effjax.layers.reductions import Reduction

Batch = Mapping[str, Any]
Kind = type[nn.Module] | tuple[type[nn.Module], ...]

_COLLECTION, _STATISTIC, _MISFIT = "taps", "statistic", "misfit"
_seen: contextvars.ContextVar[tuple[Array | None, int | None]] = contextvars.ContextVar("seen")


class Tap(nn.Module):
  """y = x: gives a path to what is no module's output; without `capture` it costs nothing.

  Example:
    >>> Tap().apply({}, 3.0)
    3.0
  """

  @nn.compact
  def __call__(self, x: Any) -> Any:
    return x


@contextlib.contextmanager
def tokens(segment_ids: Int[Array, "..."] | None, groups: Size | None = None):
  """Inside, captured values have the leading axes of `segment_ids`, and a negative id is padding.

  For modules that compute on other rows than the batch's [B, T]: memory, or tokens sorted by
  expert. With None every row counts. With `groups` the ids are those of groups, 0 … groups − 1,
  and each has a statistic of its own along a leading axis, as its parameters have.

  Example:
    >>> import jax.numpy as jnp
    >>> with tokens(jnp.array([0, 0, -1])):  # rows [3, D], of which the last is padding
    ...   pass
  """
  token = _seen.set((segment_ids, groups))
  try:
    yield
  finally:
    _seen.reset(token)


def capture(
  module: nn.Module,
  params: Params,
  batches: Batch | Iterable[Batch],
  *,
  reduce: Reduction,
  select: Chooser = "",
  kind: Kind = Linear,
  at: str = "input",
) -> dict[str, PyTree]:
  """Path of a module → statistic of what went into or came out of it, over all batches.

  Paths are those of parameters, "segments_0/layers_0/mixer/query", so that a statistic lies beside
  its parameter; as that it has a leading axis R in a scanned segment, and E in the experts of a
  mixture, each of which sees its own tokens. Seen is the first array that `__call__` is given, or
  that it returns; a module called several times accumulates. A token that is padding,
  `segment_ids` < 0, has no influence, whatever its values. One program runs all batches of a shape.

  Args:
    module: called as `layers.forward` calls it.
    params: its parameters.
    batches: tokens [B, T], segment_ids, …: one batch, or several.
    reduce: one of `effjax.layers.reductions`: `sum_of_squares`, `gram`, `absmax`, `histogram(…)`,
      `total`, `count`, `mean`, `mean_magnitude`, `keep`.
    select: a pattern that must occur in the path, or a predicate of path and statistic.
    kind: the class of module to look at, or a tuple of such; `Tap` for queries and keys.
    at: "input" or "output".

  Raises:
    ValueError: when nothing is selected, `at` is unknown, there is no batch, or there is padding
      and a selected value has other leading axes than the segment ids: a module that regroups
      tokens has to say so with `taps.tokens`.

  Example:
    >>> import jax.numpy as jnp
    >>> from effjax.layers.embedding import Embed
    >>> from effjax.layers.reductions import sum_of_squares
    >>> module = nn.Sequential((Embed(2, 1), Linear(1)))
    >>> params = {"layers_0": {"embedding": jnp.array([[2.0], [3.0]])},
    ...           "layers_1": {"kernel": jnp.ones((1, 1))}}
    >>> capture(module, params, {"tokens": jnp.array([[0, 1]])}, reduce=sum_of_squares)
    {'layers_1': Array([13.], dtype=float32)}
  """
  if at not in ("input", "output"):
    raise ValueError(f"capture: at={at!r}; allowed: 'input', 'output'")
  batches = [batches] if isinstance(batches, Mapping) else batches
  options = {"module": module, "reduce": reduce, "select": select, "kind": kind, "at": at}
  found = None
  for batch in batches:
    new = _statistics(params, dict(batch), **options)
    found = new if found is None else {p: reduce.combine(found[p], new[p]) for p in new}
  if found is None:
    raise ValueError("capture: batches is empty; allowed: a batch, or one or more of them")
  return {path: reduce.finish(statistic) for path, statistic in found.items()}


@functools.partial(jax.jit, static_argnames=("module", "reduce", "select", "kind", "at"))
def _statistics(params: Params, batch: dict, *, module, reduce, select, kind, at):
  observe = functools.partial(_observe, reduce=reduce, kind=kind, at=at)

  def run(params: Params, batch: dict) -> Mapping:
    with tokens(batch.get("segment_ids")), nn.intercept_methods(observe):
      return forward(module, params, batch, collections=(_COLLECTION,))[1]

  sown = spmd.automatic(run, (params, batch), batch["tokens"], spmd.nowhere)
  # Inside a module that another one applies, paths are relative: what was asked for is known here,
  # and the compiler drops the rest.
  return _selected(sown.get(_COLLECTION, {}), select)


def _observe(call, arguments, named, context, *, reduce: Reduction, kind: Kind, at: str):
  """Calls a method, and sows the statistic of its input or output, or the shape it cannot mask."""
  returned = call(*arguments, **named)
  module = context.module
  if context.method_name != "__call__" or not isinstance(module, kind):
    return returned
  value = jax.tree.leaves(returned if at == "output" else (arguments, named))[0]
  ids, groups = _seen.get()
  if ids is None or ids.shape == value.shape[: ids.ndim]:
    if groups is None:
      new = reduce.measure(value, None if ids is None else ids >= 0)
    else:
      new = jax.lax.map(lambda group: reduce.measure(value, ids == group), jnp.arange(groups))
    accumulate = lambda old, new: new if old is None else reduce.combine(old, new)
    module.sow(_COLLECTION, _STATISTIC, new, accumulate, lambda: None)
  else:
    misfit = _Misfit(value.shape, ids.shape)
    module.sow(_COLLECTION, _MISFIT, misfit, lambda old, new: new, lambda: None)
  return returned


@struct.dataclass
class _Misfit:
  """Where a statistic would be; it has no arrays."""

  value: tuple[int, ...] = struct.field(pytree_node=False)
  segment_ids: tuple[int, ...] = struct.field(pytree_node=False)


def _selected(sown: Mapping, select: Chooser) -> dict[str, PyTree]:
  # Misfits last: a module called twice may have sown both.
  flat = sorted(traverse_util.flatten_dict(sown).items(), key=lambda item: item[0][-1] == _MISFIT)
  found = {"/".join(key[:-1]): x for key, x in flat}
  chosen = {path: x for path, x in found.items() if chooses(select, path, x)}
  if not chosen:
    paths = ", ".join(found) or "none"
    raise ValueError(f"capture: select {select!r} matches none of the paths there are: {paths}")
  for path, x in chosen.items():
    if isinstance(x, _Misfit):
      raise ValueError(
        f"capture: {path!r} sees {x.value}, and which of it is padding is not known; allowed: "
        f"leading axes {x.segment_ids}, or other segment ids from `taps.tokens`"
      )
  return chosen
