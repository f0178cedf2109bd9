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
from effjax.quant.model import representation
from effjax.quant.nearest import nearest
from effjax.quant.packed import Packed

BLOCK = 128  # inputs whose errors are moved one by one, before all others are moved at once


def gptq(
  params: PyTree,
  grams: Statistics,
  method: str = "int4",
  *,
  damping: Scalar = 0.01,
  **options: Any,
) -> PyTree:
  """`params` with 4-bit matrices whose codes GPTQ chooses, so that ‖X (W − Ŵ)‖² is small.

  Inputs are rounded in the order of falling Hᵢᵢ. The error of input i is moved onto the later ones:
  W_j ← W_j − U_ij (W_i − Ŵ_i) / U_ii with H⁻¹ = UᵀU, U upper triangular, which leaves the least
  error that rounding those of before allows. Scales are those of the matrix as it was.

  Args:
    params: a parameter tree.
    grams: path of a layer → H [..., D, D], `capture(module, params, batches, reduce=gram)`.
    method: a representation of 4-bit codes: "int4", "int4affine", "nf4", "fp4".
    damping: share of the mean of H's diagonal that is added to all of it.
    options: of the method, as its `quantize` has them: `group=32`.

  Raises:
    ValueError: for another method; a damping below 0; where there are no statistics, or one has no
      matrix in `params`, or does not fit it.

  Example:
    >>> w, h = jnp.array([[0.4], [0.4], [7.0], [0.0]]), jnp.ones((4, 4)) + 0.01 * jnp.eye(4)
    >>> better = gptq({"up": {"kernel": w}}, {"up": h}, group=4)["up"]["kernel"]
    >>> better.materialize().ravel().tolist()  # what counts is the sum, which is 7.8
    [0.0, 1.0, 7.0, 0.0]
  """
  if not number("damping", damping) >= 0:
    raise ValueError(f"damping={damping}; allowed: 0 and more")

  def change(path: str, w: Array, gram: Array) -> Weight:
    made = representation(method).represent(path, w, **options)
    if not isinstance(made, Packed) or not isinstance(made.format, Nibbles):
      raise ValueError(f"method {method!r}; allowed: int4, int4affine, nf4, fp4")
    codes, known = each_matrix(_chosen, w.ndim - 2, made, w, gram + damping * _mean_diagonal(gram))
    if not isinstance(known, jax.core.Tracer) and not known.all():
      raise ValueError(f"H is not positive definite with damping={damping}; allowed: more of it")
    return dataclasses.replace(made, codes=codes)

  return calibrated(params, change, grams, axes=(2,))


def _mean_diagonal(gram: Float[Array, "... D D"]) -> Float[Array, "... D D"]:
  """The identity times the mean of the diagonal, or times 1 where that is 0."""
  mean = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / gram.shape[-1]
  return jnp.where(mean == 0, 1, mean) * jnp.broadcast_to(jnp.eye(gram.shape[-1]), gram.shape)


@jax.jit
def _chosen(
  made: Packed, w: Float[Array, "D F"], gram: Float[Array, "D D"]
) -> tuple[Integer[Array, "O N"], Bool[Array, ""]]:
  """GPTQ's codes of the matrix `w`, packed as those of `made` are, and whether H allows any."""
  D, _ = w.shape
  size = D + -D % BLOCK
  order = jnp.argsort(-jnp.diagonal(gram))
  pad = lambda x, *more: jnp.pad(x[order], ((0, size - D), *more))
  rows = pad(w.astype(jnp.float32), (0, 0))
  upper = _upper(gram[order][:, order])
  known = jnp.isfinite(upper).all()
  upper = jax.scipy.linalg.block_diag(upper, jnp.eye(size - D))
  constants = [pad(_spread(c, D), (0, 0)) for c in made.constants]
  codebook: Any = made.format
  table = np.asarray(codebook.table, np.float32)
  ranks = np.argsort(table, kind="stable")
  index = _rounded(rows, upper, constants, jnp.asarray(table[ranks]))
  codes = jnp.zeros(w.shape, jnp.int32).at[order].set(jnp.asarray(ranks)[index[:D]])
  lying = codes.T.astype(jnp.uint8)
  return lying[:, ::2] << 4 | lying[:, 1::2], known


def _spread(constant: Any, inputs: int) -> Float[Array, "D F"]:
  """A constant [O, n] for each of the inputs of its block."""
  values = jnp.asarray(constant.materialize() if is_weight(constant) else constant).T
  return jnp.repeat(values.astype(jnp.float32), inputs // len(values), axis=0)


def _upper(h: Float[Array, "D D"]) -> Float[Array, "D D"]:
  """U, upper triangular, with H⁻¹ = UᵀU; NaN where H is not positive definite.

  H = R Rᵀ with R upper triangular is the Cholesky decomposition of H in opposite order, and
  U = R⁻¹.
  """
  lower = jnp.linalg.cholesky(h[::-1, ::-1])
  return jax.scipy.linalg.solve_triangular(lower[::-1, ::-1], jnp.eye(len(h)))


def _rounded(
  rows: Float[Array, "D F"],
  upper: Float[Array, "D D"],
  constants: list[Float[Array, "D F"]],
  table: Float[Array, "K"],
) -> Integer[Array, "D F"]:
  """For each input the index into `table`, with the errors of those before moved onto it."""
  size, outputs = rows.shape

  def block(rows, begin):
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, begin, BLOCK)
    within = jax.lax.dynamic_slice(upper, (begin, begin), (BLOCK, BLOCK))
    scale, *zero = map(cut, constants)
    zero = zero[0] if zero else jnp.zeros_like(scale)

    def one(own, i):
      s, z, u = scale[i], zero[i], within[i]
      index = nearest(own[i] / jnp.where(s == 0, 1, s) + z, table)
      error = (own[i] - (table[index] - z) * s) / u[i]
      return own - jnp.outer(u, error), (index, error)

    _, (index, errors) = jax.lax.scan(one, cut(rows), jnp.arange(BLOCK))
    return rows - jnp.matmul(cut(upper).T, errors), index

  _, index = jax.lax.scan(block, rows, jnp.arange(0, size, BLOCK))
  return index.reshape(size, outputs)
