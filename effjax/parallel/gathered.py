"""A weight that lies in parts on the devices of a mesh and is put together where it is used.

This is the parameter half of ZeRO-3 (arXiv 1910.02054, section 5.3): each device holds 1/N of a
matrix, all of it for the moment of a product, in the forward and once more in the backward pass,
and 1/N of its gradient. Left to itself the partitioner would rather split the activations.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import weights
from effjax.core.typing import Array, Float, Int, PyTree
from effjax.parallel.shards import Shards


@weights.register(static=("shards",), kind="wrapper")
class Gathered(weights.Over):
  """`base`, an array or `Weight` split over devices, gathered for each use.

  Invariants: `shape`, `dtype` and `parameters` are those of `base`; what is gathered in the
  forward pass is not kept for the backward pass but gathered again.

  Attributes:
    base: what is gathered.
    shards: where the parts lie.
  """

  shards: Shards

  def materialize(self) -> Array:
    return weights.materialize(gather(self.base, self.shards))

  def within(self, function: Callable, *arguments: Any) -> Any:
    inside = lambda base, *given: weights.within(gather(base, self.shards), function, *given)
    return jax.checkpoint(inside)(self.base, *arguments)

  def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    return self.within(lambda w, x: weights.linear(x, w), x)

  def lookup(self, indices: Int[Array, "..."]) -> Float[Array, "... F"]:
    return self.within(weights.lookup, indices)

  @property
  def T(self) -> "Gathered":
    return Gathered(weights.transpose(self.base), self.shards)

  def __jax_array__(self) -> Array:
    return self.materialize()


def gather(tree: PyTree, shards: Shards) -> PyTree:
  """An array or a `Weight`, whole on every device; its cotangents are split as `shards` says.

  The transpose of an all-gather is a reduce-scatter, where that of a sharding constraint is the
  same constraint, which would leave whole gradients on every device.
  """

  places = shards.whole(tree)

  @jax.custom_vjp
  def whole(tree):
    return jax.lax.with_sharding_constraint(tree, places)

  def backward(_, cotangents):
    split = lambda x, at: jax.lax.with_sharding_constraint(x, shards.split(x, at.spec))
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    return (jax.tree.map(lambda x, at: split(x, at) if is_float(x) else x, cotangents, places),)

  whole.defvjp(lambda tree: (whole(tree), None), backward)
  return whole(tree)
