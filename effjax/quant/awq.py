"""AWQ: scales up the inputs that matter before they are rounded.

Lin et al., arXiv 2306.00978, section 3.2.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core.typing import Array, Float, PyTree
from effjax.core.weights import Weight
from effjax.quant.calibrated import Statistics, calibrated, each_matrix, scaled
from effjax.quant.model import representer

RATIOS = tuple(i / 20 for i in range(20))  # exponents that are tried
LEAST = 1e-4  # of a mean magnitude, below which inputs are told apart no more


def awq(
  params: PyTree,
  grams: Statistics,
  magnitudes: Statistics,
  method: str = "int4",
  **options: Any,
) -> PyTree:
  """`params` with quantised matrices whose inputs are scaled so that ‖X (W − Ŵ)‖² is small.

  Ŵ = diag(s)⁻¹ Q(diag(s) W), an `InputScaled`, with sᵢ = mean|xᵢ|^ρ divided by √(max s · min s),
  and of ρ = 0, 0.05 … 0.95 the one of the least error, for each matrix.

  Args:
    params: a parameter tree.
    grams: path of a layer → H [..., D, D], `capture(module, params, batches, reduce=gram)`.
    magnitudes: path of a layer → mean |x| [..., D], by `reduce=mean_magnitude`.
    method: one of `methods()`.
    options: of the method.

  Raises:
    ValueError: for an unknown method, or an option that it does not have; where there are no
      statistics, or one has no matrix in `params`, or does not fit it.
  """

  represent = representer(method, options)

  def change(path: str, w: Array, gram: Array, magnitude: Array) -> Weight:
    quantise = functools.partial(represent, path)
    search = functools.partial(_searched, quantise=quantise)
    return scaled(quantise, w, each_matrix(search, w.ndim - 2, w, gram, magnitude))

  return calibrated(params, change, grams, magnitudes, axes=(2, 1))


def _searched(
  w: Float[Array, "D F"],
  gram: Float[Array, "D D"],
  magnitude: Float[Array, "D"],
  *,
  quantise: Callable,
) -> Float[Array, "D"]:
  """AWQ's scales."""
  seen = jnp.trace(gram) > 0  # the mean over no tokens is none
  magnitude = jnp.where(seen, magnitude, 0)

  def scales(ratio):
    s = jnp.maximum(magnitude, LEAST) ** ratio
    return s / jnp.sqrt(s.max() * s.min())

  def error(ratio):
    off = (w - scaled(quantise, w, scales(ratio)).materialize()).astype(jnp.float32)
    return (off * (gram @ off)).sum()

  ratios = jnp.asarray(RATIOS, jnp.float32)
  return scales(ratios[jnp.argmin(jax.lax.map(error, ratios))])
