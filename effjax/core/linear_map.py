"""Linear functions whose transpose is given, where the compiler cannot derive one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, unmapped_aval
from jax.interpreters import ad, batching, mlir

from effjax.core.typing import Array, PyTree


def linear_map(
  function: Callable, transpose: Callable, residuals: PyTree, arguments: PyTree, like: PyTree
) -> PyTree:
  """`function(residuals, arguments)`, linear in the arguments, transposed by `transpose`.

  As the tangents of a `jax.custom_jvp` it makes a function differentiable both ways: forward-mode
  calls `function`, reverse-mode `transpose(residuals, cotangents)`, which gives cotangents of the
  arguments. Both are differentiated as they are written where more derivatives are asked for.
  Unlike `jax.custom_derivatives.linear_call` it can be mapped, and differentiated in `residuals`.

  Args:
    like: arrays of the shapes and types of what `function` gives.

  Example:
    >>> double = lambda x: linear_map(lambda _, x: 2 * x, lambda _, y: 2 * y, (), x, x)
    >>> float(double(3.0)), float(jax.grad(double)(3.0))
    (6.0, 2.0)
  """
  known, known_tree = jax.tree.flatten(residuals)
  linear, linear_tree = jax.tree.flatten(arguments)
  out, out_tree = jax.tree.flatten(like)
  unflatten, count = jax.tree.unflatten, len(known)

  def forward(*flat: Array) -> list[Array]:
    given = unflatten(known_tree, flat[:count]), unflatten(linear_tree, flat[count:])
    return jax.tree.leaves(function(*given))

  def backward(*flat: Array) -> list[Array]:
    given = unflatten(known_tree, flat[:count]), unflatten(out_tree, flat[count:])
    return jax.tree.leaves(transpose(*given))

  functions = {"forward": forward, "backward": backward, "count": count}
  return unflatten(out_tree, _bind((*known, *linear), map(jax.typeof, out), **functions))


def _bind(flat: Any, types: Any, **functions: Any) -> list[Array]:
  return _linear_map.bind(*map(jnp.asarray, flat), types=tuple(types), **functions)


def _run(*flat, forward, **_):
  return forward(*map(jnp.asarray, flat))


def _jvp(primals, tangents, *, forward, count, **rest):
  results = _linear_map.bind(*primals, forward=forward, count=count, **rest)
  if all(type(t) is ad.Zero for t in tangents[:count]):
    moved = map(ad.instantiate_zeros, tangents[count:])
    flat = (*primals[:count], *moved)
    return results, _linear_map.bind(*flat, forward=forward, count=count, **rest)
  moved = tuple(map(ad.instantiate_zeros, tangents))
  return results, jax.jvp(forward, tuple(map(jnp.asarray, primals)), moved)[1]


def _transpose(cotangents, *flat, backward, count, **_):
  known = flat[:count]
  return [None] * count + backward(*known, *map(ad.instantiate_zeros, cotangents))


def _batch(flat, axes, *, forward, backward, count, types):
  size = next(x.shape[a] for x, a in zip(flat, axes, strict=True) if a is not None)
  front = lambda x, a: jnp.broadcast_to(x, (size, *x.shape)) if a is None else jnp.moveaxis(x, a, 0)
  # What all share stays one array; cotangents of the arguments are not shared.
  known = [None if a is None else 0 for a in axes[:count]]
  shared = [a is None for a in known] + [False] * (len(flat) - count)
  each = zip(flat, axes, shared, strict=True)
  flat = [x if alone else front(x, a) for x, a, alone in each]
  over = lambda function: (
    lambda *flat: jax.vmap(function, (*known, *[0] * (len(flat) - count)))(*flat)
  )
  forward, backward = over(forward), over(backward)
  types = [unmapped_aval(size, 0, each) for each in types]
  results = _bind(flat, types, forward=forward, backward=backward, count=count)
  return results, [0] * len(results)


_linear_map = Primitive("linear_map")
_linear_map.multiple_results = True
_linear_map.def_impl(_run)
_linear_map.def_abstract_eval(lambda *_, types, **__: types)
ad.primitive_jvps[_linear_map] = _jvp
ad.primitive_transposes[_linear_map] = _transpose
batching.primitive_batchers[_linear_map] = _batch
mlir.register_lowering(_linear_map, mlir.lower_fun(_run, multiple_results=True))
