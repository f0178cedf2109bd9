"""What GPTQ, QMoE, AWQ and SmoothQuant share: matrices are changed by their layers' statistics.

A linear layer of inputs x errs by x (W − Ŵ), over a text by ‖X (W − Ŵ)‖² = tr (W − Ŵ)ᵀ H (W − Ŵ)
with H = XᵀX. Statistics of X are what `layers.capture` gives. A matrix whose layer has none stays
as it is. All layers are calibrated on the inputs that they have in the model as given, not on those
that quantised layers before them would leave.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import trees
from effjax.core.typing import Array, Float, PyTree
from effjax.core.weights import Weight, is_weight
from effjax.quant.input_scaled import InputScaled

Statistics = Mapping[str, Float[Array, "..."]]


def calibrated(
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


def each_matrix(
  function: Callable, leading: int, *arguments: PyTree, at_once: int | None = None
) -> PyTree:
  """function(…) of matrices along each of the leading axes, `at_once` of the last one together."""
  for i in range(leading):
    function = _mapped(function, None if i else at_once)
  return function(*arguments)


def _mapped(function: Callable, at_once: int | None) -> Callable:
  each = lambda arguments: function(*arguments)
  return lambda *arguments: jax.lax.map(each, arguments, batch_size=at_once)


def scaled(
  quantise: Callable, w: Float[Array, "... D F"], scale: Float[Array, "... D"]
) -> InputScaled:
  """diag(s)⁻¹ Q(diag(s) W)."""
  s = scale[..., None].astype(jnp.float32)
  return InputScaled(quantise((w * s).astype(w.dtype)), 1 / s)
