"""IA³: what a linear map gives, or is given, times a learned vector.

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning", arXiv 2205.05638, section 3.3: keys, values and hidden units, and nothing else trains.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from effjax.core import numerics, trees, weights
from effjax.core.trees import Chooser
from effjax.core.typing import Array, Float, Int, PyTree
from effjax.core.weights import linear, materialize, register, transpose
from effjax.peft.beside import Adapter

TARGETS = r"(mixer|cross)/(key|value)/kernel$"
FEEDFORWARD = r"ffn/(.*/)?down/kernel$"


@register(trains=("scale",), kind="adapter")
class IA3(Adapter):
  """x ↦ l ⊙ (x W0 + b), or x ↦ (l ⊙ x) W0 + b: W = W0 diag(l), or diag(l) W0.

  Invariants:
    base: W0, an array or `Weight` [..., D, F].
    scale: l, float32: [..., 1, F] of outputs, the bias among them, or [..., D, 1] of inputs; 1 at
      the start. Of a matrix with D = F = 1 it is that of the output.
  """

  scale: PyTree

  @property
  def of_inputs(self) -> bool:
    """Whether l multiplies what goes in."""
    return tuple(self.scale.shape[-2:]) != (1, self.shape[-1])

  @property
  def parameters(self) -> int:
    return super().parameters + math.prod(self.scale.shape)

  def check(self) -> None:
    super().check()
    *batch, D, F = self.shape
    given, allowed = tuple(self.scale.shape), ((*batch, 1, F), (*batch, D, 1))
    if given not in allowed:
      raise ValueError(f"IA3: scale has shape {given}; allowed: {allowed[0]}, {allowed[1]}")

  def specs(self, axes: Sequence[Any]) -> "IA3":
    *batch, inputs, outputs = axes
    along = (*batch, inputs, None) if self.of_inputs else (*batch, None, outputs)
    return IA3(weights.specs(self.base, axes), weights.specs(self.scale, along))

  def materialize(self) -> Array:
    base = materialize(self.base)
    return (base.astype(numerics.wide(base.dtype)) * self.scale).astype(base.dtype)

  def beneath(self, w: Float[Array, "... D F"]) -> Array:
    divided = w.astype(numerics.wide(w.dtype)) / jnp.where(self.scale == 0, 1, self.scale)
    return jnp.where(self.scale == 0, materialize(self.base), divided.astype(w.dtype))

  def affine(self, x: Float[Array, "... D"], bias: Any) -> Float[Array, "... F"]:
    if self.of_inputs:
      return linear(self._times(x), self.base, bias)
    return self._times(linear(x, self.base, bias))

  def added(self, x: Float[Array, "... D"], y: Float[Array, "... F"], bias: Any) -> Array:
    return self.affine(x, bias) - y

  def lookup(self, indices: Int[Array, "..."]) -> Float[Array, "... F"]:
    rows = weights.lookup(self.base, indices)
    scale = numerics.expand(self.scale.reshape(-1), rows.ndim)
    if self.of_inputs:
      scale = weights.lookup(self.scale, indices)
    return (rows.astype(numerics.wide(rows.dtype)) * scale).astype(rows.dtype)

  def offset(self, bias: Any) -> Any:
    bias = super().offset(bias)
    if self.of_inputs:
      return bias
    added = materialize(bias).astype(numerics.wide(bias.dtype)) * self.scale.squeeze(-2)
    return added.astype(bias.dtype)

  @property
  def T(self) -> "IA3":
    return IA3(transpose(self.base), jnp.matrix_transpose(self.scale))

  def _times(self, x: Array) -> Array:
    return x * numerics.expand(self.scale.reshape(-1), x.ndim).astype(x.dtype)


def add(
  params: PyTree,
  targets: Chooser | None = TARGETS,
  feedforward: Chooser | None = FEEDFORWARD,
) -> PyTree:
  """`params` with an `IA3` over each targeted matrix; the model computes the same as before.

  Args:
    params: a parameter tree; matrices are [..., D, F], with leading axes for layers or experts,
      each of which gets a vector of its own.
    targets: pattern or predicate on paths of the matrices whose outputs are multiplied, biases
      included; by default those of keys and values. None is none.
    feedforward: likewise of those whose inputs are; by default the maps from the hidden units.

  Raises:
    ValueError: when a pattern matches nothing or no matrix, both match one, both are None, or an
      adapter stands there.

  Example:
    >>> mixer, ffn = {"key": {"kernel": jnp.ones((2, 3))}}, {"down": {"kernel": jnp.ones((4, 2))}}
    >>> adapted = add({"mixer": mixer, "ffn": ffn})
    >>> adapted["mixer"]["key"]["kernel"].scale.shape, adapted["ffn"]["down"]["kernel"].scale.shape
    ((1, 3), (4, 1))
  """
  outputs = {} if targets is None else trees.matrices(params, targets)
  inputs = {} if feedforward is None else trees.matrices(params, feedforward)
  if not outputs and not inputs:
    raise ValueError("ia3: targets=None and feedforward=None; allowed: a pattern for one of them")
  if both := outputs.keys() & inputs.keys():
    raise ValueError(f"ia3: targets and feedforward both match {min(both)}; allowed: one of them")
  for path, leaf in (outputs | inputs).items():
    if isinstance(leaf, IA3):
      raise ValueError(f"{path} has an IA3 already; merge or detach it first")

  def change(path: str, base: Any) -> IA3:
    *batch, D, F = base.shape
    return IA3(base, jnp.ones((*batch, 1, F) if path in outputs else (*batch, D, 1), jnp.float32))

  return trees.update(params, lambda path, leaf: path in outputs or path in inputs, change)
