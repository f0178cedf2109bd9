"""Interpreted kernels inside `shard_map`.

A kernel is traced as what one device does, without a word of mesh axes; an interpreter runs it
where constants and what varies over an axis may not meet. For its time nothing varies.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from effjax.core import numerics
from effjax.core.typing import PyTree


def alone(call: Callable[..., Any], operands: PyTree) -> Any:
  """`call(*operands)`, whose results vary over the mesh axes that operands vary over."""
  return numerics.vary_alike(call(*jax.tree.map(unmarked, operands)), operands)


def unmarked(x: Any) -> Any:
  """`x` without the mark that it varies over mesh axes."""
  x = jnp.asarray(x)
  return _unmarked.bind(x) if jax.typeof(x).manual_axis_type.varying else x


_unmarked = Primitive("unmarked")
_unmarked.def_impl(lambda x: x)
_unmarked.def_abstract_eval(lambda x: x.update(manual_axis_type=jax.typeof(1.0).manual_axis_type))
batching.primitive_batchers[_unmarked] = lambda x, axes: (_unmarked.bind(*x), *axes)
mlir.register_lowering(_unmarked, lambda _, x: [x])
