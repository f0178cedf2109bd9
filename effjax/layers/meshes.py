"""Modules on meshes of explicit axes, where the types of arrays say how they are split."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax.core import lift
from jax.sharding import PartitionSpec

from effjax.core import spmd
from effjax.core.typing import PyTree


def on_any_mesh(method: Callable[..., Any]) -> Callable[..., Any]:
  """A decorator for `__call__(self, x, …)` → y or, with `cache`, (y, new cache): see `automatic`.

  y is split as x is, along the axes they share, and the new cache as the one given.

  Example:
    >>> class Double(nn.Module):
    ...   @on_any_mesh
    ...   @nn.compact
    ...   def __call__(self, x, cache=None):
    ...     return 2 * x, cache
    >>> Double().apply({}, 2.0)
    (4.0, None)
  """
  lifted = nn.transforms.lift_transform(_automatic, method)
  signature = inspect.signature(method)

  @functools.wraps(method)
  def anywhere(self: nn.Module, *arguments: Any, **named: Any) -> Any:
    variables = {} if self.scope is None else self.variables
    if not spmd.explicit_mesh((arguments, named, variables)):
      return method(self, *arguments, **named)
    given = signature.bind(self, *arguments, **named).arguments
    x = list(given.values())[1]
    return lifted(self, (x, given.get("cache")), *arguments, **named)

  return anywhere


def _automatic(function: Callable[..., Any]) -> Callable[..., Any]:
  """Flax's form of `spmd.automatic`: variables and random keys are arguments, and results too."""

  def inner(scope_of, repack, variables, keys, like, *arguments, **named):
    def compute(variables, keys, arguments, named):
      scope = scope_of(variables, keys)
      return function(scope, *arguments, **named), repack(scope)

    def split(results: PyTree) -> list[PartitionSpec]:
      x, cache = like
      y, made = results
      first = y[0] if isinstance(y, tuple) else y
      kept = jax.tree.leaves(cache) if isinstance(y, tuple) else []
      return [spmd.spec_like(x, first), *map(spmd.spec, kept), *spmd.nowhere(made)]

    return spmd.automatic(compute, (variables, keys, arguments, named), like[0], split)

  return lift.pack(inner, (True,), (True,), (True,), name="automatic", enable_kwargs=True)
