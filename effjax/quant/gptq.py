"""GPTQ: rounds one input after another, and moves the error of each onto those that are left.

Frantar et al., arXiv 2210.17323, section 3.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.known import number
from effjax.core.typing import Array, Bool, Float, Integer, PyTree, Scalar
from effjax.core.weights import Weight, is_weight
from effjax.kernels.quantized_matmul import Nibbles
from effjax.quant.calibrated import Statistics, calibrated, each_matrix
from effjax.quant.model import representer
from effjax.quant.nearest import nearest
from effjax.quant.one_by_one import check_definite, damped, one_by_one
from effjax.quant.packed import Packed


def gptq(
  params: PyTree,
  grams: Statistics,
  method: str = "int4",
  *,
  damping: Scalar = 0.01,
  **options: Any,
) -> PyTree:
  """`params` with 4-bit matrices whose codes GPTQ chooses, so that ‖X (W − Ŵ)‖² is small.

  Inputs are rounded as `one_by_one` says. Scales are those of the matrix as it was.

  Args:
    params: a parameter tree.
    grams: path of a layer → H [..., D, D], `capture(module, params, batches, reduce=gram)`.
    method: a representation of 4-bit codes: "int4", "int4affine", "nf4", "fp4".
    damping: share of the mean of H's diagonal that is added to all of it.
    options: of the method, as its `quantize` has them: `group=32`.

  Raises:
    ValueError: for another method, or an option that it does not have; a damping below 0; where
      there are no statistics, or one has no matrix in `params`, or does not fit it.

  Example:
    >>> w, h = jnp.array([[0.4], [0.4], [7.0], [0.0]]), jnp.ones((4, 4)) + 0.01 * jnp.eye(4)
    >>> better = gptq({"up": {"kernel": w}}, {"up": h}, group=4)["up"]["kernel"]
    >>> better.materialize().ravel().tolist()  # what counts is the sum, which is 7.8
    [0.0, 1.0, 7.0, 0.0]
  """
  number("damping", damping, of="gptq", least=0)
  represent = representer(method, options)

  def change(path: str, w: Array, gram: Array) -> Weight:
    made = represent(path, w)
    if not isinstance(made, Packed) or not isinstance(made.format, Nibbles):
      raise ValueError(f"method {method!r}; allowed: int4, int4affine, nf4, fp4")
    codes, known = each_matrix(_chosen, w.ndim - 2, made, w, damped(gram, damping))
    check_definite(known, damping)
    return dataclasses.replace(made, codes=codes)

  return calibrated(params, change, grams, axes=(2,))


@jax.jit
def _chosen(
  made: Packed, w: Float[Array, "D F"], gram: Float[Array, "D D"]
) -> tuple[Integer[Array, "O N"], Bool[Array, ""]]:
  """GPTQ's codes of the matrix `w`, packed as those of `made` are, and whether H allows any."""
  format: Any = made.format
  table = np.asarray(format.table, np.float32)
  ranks = np.argsort(table, kind="stable")
  increasing = jnp.asarray(table[ranks])

  def choose(values, constants):
    scale, *zero = constants
    z = zero[0] if zero else jnp.zeros_like(scale)
    index = nearest(values / jnp.where(scale == 0, 1, scale) + z, increasing)
    return jnp.asarray(ranks)[index], (increasing[index] - z) * scale

  codes, known = one_by_one(w, gram, choose, [_spread(c, len(w)) for c in made.constants])
  return format.pack(codes.T), known


def _spread(constant: Any, inputs: int) -> Float[Array, "D F"]:
  """A constant [O, n] for each of the inputs of its block."""
  values = jnp.asarray(constant.materialize() if is_weight(constant) else constant).T
  return jnp.repeat(values.astype(jnp.float32), inputs // len(values), axis=0)
