"""LoRA: a frozen matrix plus a trained low-rank one (Hu et al., arXiv 2106.09685, section 4.1).

rsLoRA, the scale α/√r: Kalajdzievski, arXiv 2312.03732. The base may be any weight representation;
over a quantised one this is QLoRA (Dettmers et al., arXiv 2305.14314), with nothing added.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import trees, weights
from effjax.core.known import number
from effjax.core.trees import Chooser
from effjax.core.typing import Array, Float, Int, Key, PyTree, Scalar, Size
from effjax.core.weights import (
  Over,
  Weight,
  is_weight,
  linear,
  materialize,
  register,
  transpose,
)

TARGETS = r"mixer/(query|value)/kernel$"


@register(trains=("a", "b"), kind="adapter")
class LoRA(Over):
  """W = W0 + s·A B, computed as x W0 + s·(x A) B.

  Invariants:
    base: W0, an array or `Weight` [..., D, F].
    a, b: [..., D, r] and [..., r, F]; B = 0 at the start, so that W = W0.
    scale: s, [..., 1, 1]: α/r, or α/√r for rsLoRA. An array, so that scanned layers may differ.
  The type is that of the base; a, b and scale are float32, and products are in the type of x.
  """

  a: PyTree
  b: PyTree
  scale: PyTree

  @property
  def rank(self) -> int:
    return self.a.shape[-1]

  @property
  def parameters(self) -> int:
    return super().parameters + math.prod(self.a.shape) + math.prod(self.b.shape)

  @property
  def flops(self) -> float:
    D, F = self.shape[-2:]
    return super().flops + 2.0 * self.rank * (D + F)

  def check(self) -> None:
    *batch, D, F = self.shape
    for name, allowed in (("a", (D, self.rank)), ("b", (self.rank, F)), ("scale", (1, 1))):
      given = tuple(getattr(self, name).shape)
      if given != (*batch, *allowed):
        raise ValueError(f"LoRA: {name} has shape {given}; allowed: {(*batch, *allowed)}")

  def specs(self, axes: Sequence[Any]) -> "LoRA":
    *batch, inputs, outputs = axes
    base, a, b = (
      weights.specs(x, along)
      for x, along in (
        (self.base, axes),
        (self.a, (*batch, inputs, None)),
        (self.b, (*batch, None, outputs)),
      )
    )
    return LoRA(base, a, b, weights.specs(self.scale, (*batch, None, None)))

  def delta(self) -> Float[Array, "..."]:
    """s·A B, [..., D, F] in float32."""
    product = jnp.matmul(self.a, self.b, preferred_element_type=jnp.float32)
    return product * jnp.broadcast_to(self.scale, product.shape)

  def materialize(self) -> Array:
    base = materialize(self.base)
    return (base.astype(jnp.float32) + self.delta()).astype(base.dtype)

  def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    return linear(x, self.base) + self._scaled(linear(linear(x, self.a), self.b))

  def product(self, x: Array, multiply: Callable[[Array, Array], Array]) -> Array:
    low_rank = multiply(multiply(x, self.a * self.scale), self.b)
    return weights.product(x, self.base, multiply) + low_rank

  def lookup(self, indices: Int[Array, "..."]) -> Float[Array, "... F"]:
    rows = weights.lookup(self.base, indices)
    return rows + self._scaled(linear(weights.lookup(self.a, indices), self.b)).astype(rows.dtype)

  @property
  def T(self) -> "LoRA":
    return LoRA(
      transpose(self.base), jnp.matrix_transpose(self.b), jnp.matrix_transpose(self.a), self.scale
    )

  def _scaled(self, y: Array) -> Array:
    return y * self.scale.reshape(()).astype(y.dtype)


def add(
  params: PyTree,
  key: Key,
  *,
  rank: Size = 8,
  alpha: Scalar = 16,
  targets: Chooser = TARGETS,
  exclude: Chooser | None = None,
  rs: bool = False,
) -> PyTree:
  """`params` with a `LoRA` over each targeted matrix; the model computes the same as before.

  A ~ U(−1/√D, 1/√D), the Kaiming-uniform start of Hugging Face's peft; B = 0. Each path draws from
  its own key, whatever else is targeted. Shapes suffice (`jax.eval_shape`).

  Args:
    params: a parameter tree; matrices are [..., D, F], with leading axes for layers or experts,
      each of which gets factors of its own.
    key: PRNG key for A.
    rank: r, 1 … min(D, F).
    alpha: α; the product is scaled by α/r.
    targets: pattern or predicate on paths; by default the query and value projections.
    exclude: pattern or predicate of targets to leave out.
    rs: scale by α/√r.

  Raises:
    ValueError: when nothing matches, nothing of it is a matrix, one has a LoRA already, or the
      rank is out of range.

  Example:
    >>> params = {"mixer": {"query": {"kernel": jnp.ones((4, 6))}, "out": {"kernel": jnp.eye(6)}}}
    >>> adapted = add(params, jax.random.key(0), rank=2)
    >>> w = adapted["mixer"]["query"]["kernel"]
    >>> w.a.shape, w.b.shape, float(w.scale[0, 0]), w.parameters
    ((4, 2), (2, 6), 8.0, 44)
  """
  found = trees.matrices(params, targets, exclude)
  for path, leaf in found.items():
    _check(path, leaf, rank)
  alpha = number("alpha", alpha)

  def change(path: str, base):
    return init(
      base, trees.path_key(key, path), rank=rank, scale=alpha / (math.sqrt(rank) if rs else rank)
    )

  return trees.update(params, lambda path, leaf: path in found, change)


def init(base: Array | Weight, key: Key, *, rank: Size, scale: Scalar) -> LoRA:
  """A `LoRA` over `base` that changes nothing yet."""
  *batch, D, F = base.shape
  bound = 1 / math.sqrt(D)
  a = jax.random.uniform(key, (*batch, D, rank), jnp.float32, -bound, bound)
  b = jnp.zeros((*batch, rank, F), jnp.float32)
  return LoRA(base, a, b, jnp.full((*batch, 1, 1), scale, jnp.float32))


def merge(params: PyTree) -> PyTree:
  """`params` with each `LoRA` multiplied out to the plain matrix W0 + s·A B.

  Over a quantised base that is the dequantised W0 plus the product, in the base's type.

  Raises:
    ValueError: when there is no LoRA in `params`.

  Example:
    >>> adapted = add({"kernel": jnp.eye(2)}, jax.random.key(0), rank=1, targets="kernel")
    >>> merge(adapted)["kernel"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
  """
  return trees.update(params, _chosen(params), lambda path, leaf: leaf.materialize())


def unmerge(merged: PyTree, adapted: PyTree) -> PyTree:
  """The inverse of `merge`: each `LoRA` of `adapted`, over the base that `merged` − s·A B gives.

  Bit-close: a float32 base comes back to within the rounding of one addition and one subtraction; a
  quantised base comes back as the array it stood for.

  Args:
    merged: what `merge` gave, possibly changed since outside the merged matrices.
    adapted: the tree that was merged.

  Raises:
    ValueError: when `adapted` has no LoRA or `merged` no matrix of that shape in its place.
  """
  chosen, plain = _chosen(adapted), trees.items(merged)
  for path, leaf in trees.select(adapted, chosen).items():
    if path not in plain or tuple(plain[path].shape) != leaf.shape or is_weight(plain[path]):
      raise ValueError(f"merged has no plain matrix {leaf.shape} at {path}")

  def change(path: str, w: Array):
    leaf = trees.items(adapted)[path]
    base = (w.astype(jnp.float32) - leaf.delta()).astype(w.dtype)
    return LoRA(base, leaf.a, leaf.b, leaf.scale)

  return trees.update(merged, lambda path, leaf: chosen(path, trees.items(adapted)[path]), change)


def _chosen(params: PyTree):
  if not any(isinstance(leaf, LoRA) for leaf in trees.items(params).values()):
    raise ValueError("params has no LoRA weight; allowed: what lora.add returns")
  return lambda path, leaf: isinstance(leaf, LoRA)


def _check(path: str, leaf: Array | Weight, rank: Size) -> None:
  if isinstance(leaf, LoRA):
    raise ValueError(f"{path} has a LoRA already; merge it first, or exclude it")
  allowed = min(leaf.shape[-2:])
  if not 1 <= number("rank", rank, integer=True) <= allowed:
    raise ValueError(f"rank {rank} for {path} {tuple(leaf.shape)}; allowed: 1 … {allowed}")
