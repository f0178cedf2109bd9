"""QMoE: the matrices of experts in three numbers a row, and in less than a bit a weight.

Frantar & Alistarh, arXiv 2310.16795, sections 3 and 4.
"""

import jax
import jax.numpy as jnp

from effjax.core.known import number
from effjax.core.typing import Array, Bool, DTypeLike, Float, Int, PyTree, Scalar
from effjax.quant.basics import check_scales
from effjax.quant.calibrated import Statistics, calibrated, each_matrix
from effjax.quant.one_by_one import check_definite, damped, one_by_one
from effjax.quant.packed import lying
from effjax.quant.ternary import Ternary, check_encodable, ends, nearest, numbers

EXPERTS = 16  # that are calibrated together


def qmoe(
  params: PyTree,
  grams: Statistics,
  *,
  damping: Scalar = 0.1,
  scale_dtype: DTypeLike = jnp.float32,
) -> PyTree:
  """`params` with `Ternary` matrices whose numbers are chosen so that ‖X (W − Ŵ)‖² is small.

  Inputs are rounded as by `gptq`, each to the nearest of the least number of its output, 0, and the
  largest, of the matrix as it was. Experts are calibrated by their own rows; one that no row went
  to is rounded to the nearest.

  Args:
    params: a parameter tree, whose values are known.
    grams: path of a layer → H [..., D, D]: `capture(module, params, batches, reduce=gram,
      select="experts")`, or of any other layers.
    damping: share of the mean of H's diagonal that is added to all of it.
    scale_dtype: as for `Ternary.quantize`.

  Raises:
    ValueError: for a damping below 0, or another type; matrices that are traced; where there are no
      statistics, or one has no matrix in `params`, or does not fit it.

  Example:
    >>> w, h = jnp.array([[0.45], [0.45], [1.0]]), jnp.ones((3, 3)) + 0.1 * jnp.eye(3)
    >>> small = qmoe({"up": {"kernel": w}}, {"up": h}, damping=0)["up"]["kernel"]
    >>> small.materialize().ravel().tolist()  # what counts is the sum, which is 1.9
    [0.0, 1.0, 1.0]
  """
  number("damping", damping, of="qmoe", least=0)

  def change(path: str, w: Array, gram: Array) -> Ternary:
    check_encodable(w)
    values = ends(lying(w, False, "block", 1), scale_dtype)
    check_scales(values)
    arguments = w, values, damped(gram, damping)
    symbols, definite = each_matrix(_chosen, w.ndim - 2, *arguments, at_once=EXPERTS)
    check_definite(definite, damping)
    return Ternary.of(symbols, values, dtype=w.dtype)

  return calibrated(params, change, grams, axes=(2,))


@jax.jit
def _chosen(
  w: Float[Array, "D F"], values: Float[Array, "F 2"], gram: Float[Array, "D D"]
) -> tuple[Int[Array, "F D"], Bool[Array, ""]]:
  """The symbols of each output, and whether H allows any."""

  def choose(column: Array, _) -> tuple[Array, Array]:
    symbols = nearest(column[:, None], values)
    return symbols[:, 0], numbers(symbols, values.astype(column.dtype))[:, 0]

  symbols, definite = one_by_one(w, gram, choose)
  return symbols.T, definite
