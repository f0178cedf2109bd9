"""Quantising with a text at hand: what the inputs of a matrix are like decides how it is rounded.

A linear layer of inputs x errs by x (W − Ŵ), over a text by ‖X (W − Ŵ)‖² = tr (W − Ŵ)ᵀ H (W − Ŵ)
with H = XᵀX. Three ways to make that small, each from statistics that `layers.capture` takes:

  * GPTQ rounds one input after another, and moves the error of each onto those that are left
    (Frantar et al., arXiv 2210.17323);
  * AWQ scales inputs that matter up before they are rounded (Lin et al., arXiv 2306.00978);
  * SmoothQuant scales inputs with large activations down, and their weights up, where both are
    rounded (Xiao et al., arXiv 2211.10438).

A matrix whose layer has no statistic stays as it is. All layers are calibrated on the inputs that
they have in the model as given, not on those that quantised layers before them would leave.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import trees
from effjax.core.known import number
from effjax.core.typing import Array, Bool, Float, Integer, PyTree, Scalar
from effjax.core.weights import Weight, is_weight
from effjax.kernels.quantized_matmul import Nibbles
from effjax.quant.input_scaled import InputScaled
from effjax.quant.model import representation
from effjax.quant.nearest import nearest
from effjax.quant.packed import Packed

BLOCK = 128  # inputs whose errors are moved one by one, before all others are moved at once
RATIOS = tuple(i / 20 for i in range(20))  # exponents that AWQ tries
LEAST = 1e-4  # of a mean magnitude, below which AWQ tells inputs apart no more

Statistics = Mapping[str, Float[Array, "..."]]


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
    codes, known = _each_matrix(_chosen, w.ndim - 2, made, w, gram + damping * _mean_diagonal(gram))
    if not isinstance(known, jax.core.Tracer) and not known.all():
      raise ValueError(f"H is not positive definite with damping={damping}; allowed: more of it")
    return dataclasses.replace(made, codes=codes)

  return _calibrated(params, change, grams, axes=(2,))


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
    ValueError: for an unknown method; where there are no statistics, or one has no matrix in
      `params`, or does not fit it.
  """

  def change(path: str, w: Array, gram: Array, magnitude: Array) -> Weight:
    quantise = functools.partial(representation(method).represent, path, **options)
    search = functools.partial(_searched, quantise=quantise)
    return _scaled(quantise, w, _each_matrix(search, w.ndim - 2, w, gram, magnitude))

  return _calibrated(params, change, grams, magnitudes, axes=(2, 1))


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
    ValueError: for an unknown method; an alpha outside 0 … 1; where there are no statistics, or one
      has no matrix in `params`, or does not fit it.

  Example:
    >>> w = jnp.array([[1.0], [1.0]])
    >>> smoothed = smoothquant({"up": {"kernel": w}}, {"up": jnp.array([100.0, 1.0])})
    >>> smoothed["up"]["kernel"].scale.ravel()
    Array([0.1, 1. ], dtype=float32)
  """
  if not 0 <= number("alpha", alpha) <= 1:
    raise ValueError(f"alpha={alpha}; allowed: 0 … 1")

  def change(path: str, w: Array, peak: Array) -> Weight:
    largest = jnp.abs(w).max(-1)
    known = (peak > 0) & (largest > 0)
    scale = jnp.where(known, peak, 1) ** alpha / jnp.where(known, largest, 1) ** (1 - alpha)
    return _scaled(functools.partial(representation(method).represent, path, **options), w, scale)

  return _calibrated(params, change, peaks, axes=(1,))


def _calibrated(
  params: PyTree, change: Callable, *statistics: Statistics, axes: Sequence[int]
) -> PyTree:
  """`params` with change(path, matrix, *its statistics) where a layer has them.

  A statistic has `axes`: one, of the inputs, or two of them.
  """
  names = set(statistics[0])
  if not names or any(set(each) != names for each in statistics):
    given = " and ".join(", ".join(sorted(each)) or "none" for each in statistics)
    raise ValueError(f"statistics are of {given}; allowed: of the same layers, at least of one")
  found = {path: leaf for path, leaf in trees.items(params).items() if path.endswith("/kernel")}
  layer = lambda path: path.removesuffix("/kernel")
  chosen = {path: leaf for path, leaf in found.items() if layer(path) in names}
  if missing := names - {layer(path) for path in chosen}:
    raise ValueError(
      f"statistics of {', '.join(sorted(missing))} have no kernel; allowed: "
      f"{', '.join(sorted(map(layer, found))) or 'none'}"
    )

  def visit(path: str, w: Any) -> Weight:
    if is_weight(w):
      raise ValueError(f"{path} is {type(w).__name__} already; allowed: plain arrays")
    own = [jnp.asarray(each[layer(path)]) for each in statistics]
    by_input = tuple(w.shape[:-1])
    allowed = (by_input, (*by_input, w.shape[-2]))
    for statistic, axis in zip(own, axes, strict=True):
      if statistic.shape != allowed[axis - 1]:
        given = f"{path}: a statistic has shape {statistic.shape}"
        raise ValueError(f"{given}; allowed: {allowed[axis - 1]}")
    try:
      return change(path, jnp.asarray(w), *own)
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error

  return trees.update(params, lambda path, leaf: path in chosen, visit)


def _each_matrix(function: Callable, leading: int, *arguments: PyTree) -> PyTree:
  """function(…) of matrices, one after the other along each of the leading axes."""
  for _ in range(leading):
    function = _mapped(function)
  return function(*arguments)


def _mapped(function: Callable) -> Callable:
  return lambda *arguments: jax.lax.map(lambda each: function(*each), arguments)


def _scaled(
  quantise: Callable, w: Float[Array, "... D F"], scale: Float[Array, "... D"]
) -> InputScaled:
  """diag(s)⁻¹ Q(diag(s) W)."""
  s = scale[..., None].astype(jnp.float32)
  return InputScaled(quantise((w * s).astype(w.dtype)), 1 / s)


def _searched(
  w: Float[Array, "D F"],
  gram: Float[Array, "D D"],
  magnitude: Float[Array, "D"],
  *,
  quantise: Callable,
) -> Float[Array, "D"]:
  """AWQ's scales."""

  def scales(ratio):
    s = jnp.maximum(magnitude, LEAST) ** ratio
    return s / jnp.sqrt(s.max() * s.min())

  def error(ratio):
    off = (w - _scaled(quantise, w, scales(ratio)).materialize()).astype(jnp.float32)
    return (off * (gram @ off)).sum()

  ratios = jnp.asarray(RATIOS, jnp.float32)
  return scales(ratios[jnp.argmin(jax.lax.map(error, ratios))])


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
