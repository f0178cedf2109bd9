"""SmoothQuant: scales down inputs with large activations, and up their weights, to round both.

Xiao et al., arXiv 2211.10438, section 4.
"""

import functools
from typing import Any

import jax.numpy as jnp

from effjax.core.known import number
from effjax.core.typing import Array, PyTree, Scalar
from effjax.core.weights import Weight
from effjax.quant.calibrated import Statistics, calibrated, scaled
from effjax.quant.model import representer


def smoothquant(
  params: PyTree,
  peaks: Statistics,
  method: str = "int8dynamic",
  *,
  alpha: Scalar = 0.5,
  **options: Any,
) -> PyTree:
  """`params` with quantised matrices that take over a part of the range of their inputs.

  x W = (x / s) (diag(s) W), an `InputScaled`, with sᵢ = max|xᵢ|^α / max|Wᵢ|^(1−α).

  Args:
    params: a parameter tree.
    peaks: path of a layer → max |x| [..., D], `capture(module, params, batches, reduce=absmax)`.
    method: one of `methods()`, of which those that round activations gain.
    alpha: how much of the range moves, 0 … 1.
    options: of the method.

  Raises:
    ValueError: for an unknown method, or an option that it does not have; an alpha outside 0 … 1;
      where there are no statistics, or one has no matrix in `params`, or does not fit it.

  Example:
    >>> w = jnp.array([[1.0], [1.0]])
    >>> smoothed = smoothquant({"up": {"kernel": w}}, {"up": jnp.array([100.0, 1.0])})
    >>> smoothed["up"]["kernel"].scale.ravel()
    Array([0.1, 1. ], dtype=float32)
  """
  if not 0 <= number("alpha", alpha) <= 1:
    raise ValueError(f"alpha={alpha}; allowed: 0 … 1")
  represent = representer(method, options)

  def change(path: str, w: Array, peak: Array) -> Weight:
    largest = jnp.abs(w).max(-1)
    known = (peak > 0) & (largest > 0)
    scale = jnp.where(known, peak, 1) ** alpha / jnp.where(known, largest, 1) ** (1 - alpha)
    return scaled(functools.partial(represent, path), w, scale)

  return calibrated(params, change, peaks, axes=(1,))
