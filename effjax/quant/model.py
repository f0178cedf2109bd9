"""Quantising the matrices of a model, and going back."""

from typing import Any

import jax

from effjax.core import trees
from effjax.core.register import REPRESENTATIONS
from effjax.core.trees import Chooser
from effjax.core.typing import PyTree
from effjax.core.weights import Weight, is_weight

TARGETS = r"^(?!.*(router|conv)).*\b(kernel|embedding)$"


def methods() -> dict[str, type[Weight]]:
  """Name → representation, of everything registered as "quantised" (`core.weights`)."""
  known = REPRESENTATIONS.values()
  weights = (cls for cls in known if issubclass(cls, Weight))
  return {cls.__name__.lower(): cls for cls in weights if cls.kind == "quantised"}


def quantize(params: PyTree, method: str = "int8", targets: Chooser = TARGETS) -> PyTree:
  """`params` with each targeted matrix in a quantised representation.

  What a representation makes of the parameter at a path is its `represent`.

  Args:
    params: a parameter tree; leading axes of a matrix (scanned layers, experts) are a batch.
    method: one of `methods()`: "int8".
    targets: pattern or predicate on paths; by default all kernels and embedding tables, but not
      norms, biases, routers and convolutions.

  Raises:
    ValueError: for an unknown method; when no matrix matches, one is quantised already or cannot
      be, as one of integers or, where values are known, one that holds NaN or infinity.

  Example:
    >>> import jax.numpy as jnp
    >>> params = {"up": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
    >>> small = quantize(params)
    >>> type(small["up"]["kernel"]).__name__, trees.nbytes(params), trees.nbytes(small)
    ('Int8', 160, 96)
  """
  if method not in methods():
    raise ValueError(f"method {method!r} is unknown; allowed: {', '.join(methods())}")
  found = trees.matrices(params, targets)
  for path, leaf in found.items():
    if is_weight(leaf):
      raise ValueError(f"{path} is {type(leaf).__name__} already; allowed: plain arrays")

  def represent(path: str, leaf: Any) -> Weight:
    try:
      return methods()[method].represent(path, leaf)
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error

  return trees.update(params, lambda path, leaf: path in found, represent)


def dequantize(params: PyTree) -> PyTree:
  """`params` with plain arrays in place of the quantised matrices; others stay as they are.

  Example:
    >>> import jax.numpy as jnp
    >>> dequantize(quantize({"kernel": jnp.eye(2)}))["kernel"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
  """
  quantised = lambda leaf: is_weight(leaf) and leaf.kind == "quantised"
  plain = lambda leaf: leaf.materialize() if quantised(leaf) else leaf
  return jax.tree.map(plain, params, is_leaf=quantised)
