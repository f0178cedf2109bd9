"""Quantising the matrices of a model, and going back."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from effjax.core import trees
from effjax.core.register import REPRESENTATIONS
from effjax.core.trees import Chooser
from effjax.core.typing import Array, PyTree
from effjax.core.weights import Weight, is_weight

TARGETS = r"^(?!.*(router|conv)).*\b(kernel|embedding)$"


def methods() -> dict[str, type[Weight]]:
  """Name → representation, of what is registered as "quantised" and has a `represent`."""
  weights = (cls for cls in REPRESENTATIONS.values() if issubclass(cls, Weight))
  own = (cls for cls in weights if cls.represent.__qualname__ != Weight.represent.__qualname__)
  return {cls.__name__.lower(): cls for cls in own if cls.kind == "quantised"}


def representation(method: str) -> type[Weight]:
  """The one of `methods()` that is called so.

  Raises:
    ValueError: for an unknown method.

  Example:
    >>> representation("int8").__name__
    'Int8'
  """
  if method not in methods():
    raise ValueError(f"method {method!r} is unknown; allowed: {', '.join(methods())}")
  return methods()[method]


def representer(method: str, options: Mapping[str, Any]) -> Callable[[str, Any], Weight]:
  """(path, matrix) → the weight that the method makes with `options`.

  Raises:
    ValueError: for an unknown method, and for an option that it does not have.

  Example:
    >>> representer("int4", {"bits": 3})
    Traceback (most recent call last):
    ValueError: method 'int4' has no option 'bits'; allowed: group, scale_dtype, symmetric, table
  """
  cls = representation(method)
  allowed = _options(cls)
  if allowed is not None and (unknown := sorted(options.keys() - allowed)):
    raise ValueError(
      f"method {method!r} has no option {', '.join(map(repr, unknown))}; allowed: "
      f"{', '.join(sorted(allowed)) or 'none'}"
    )
  return functools.partial(cls.represent, **options)


def _options(cls: Any) -> set[str] | None:
  """What `represent` takes besides a path and a matrix; None where that cannot be told.

  Its `**options` are those of `quantize`, whose own are those of the class that it is made from.
  """
  makers = [(cls.represent, 2)]
  makers += [(each.quantize, 1) for each in cls.__mro__ if "quantize" in vars(each)]
  found: set[str] = set()
  for make, given in makers:
    own = list(inspect.signature(make).parameters.values())[given:]
    found |= {each.name for each in own if each.kind is not each.VAR_KEYWORD}
    if not any(each.kind is each.VAR_KEYWORD for each in own):
      return found
  return None


def quantize(
  params: PyTree, method: str = "int8", targets: Chooser = TARGETS, **options: Any
) -> PyTree:
  """`params` with each targeted matrix in a quantised representation.

  What a representation makes of the parameter at a path is its `represent`.

  Args:
    params: a parameter tree; leading axes of a matrix (scanned layers, experts) are a batch.
    method: one of `methods()`: "int8", "int8dynamic", "llmint8", "llmint8exact", "int4",
      "int4affine", "nf4", "fp4", "palette", "gguf", "ternary".
    targets: pattern or predicate on paths; by default all kernels and embedding tables, but not
      norms, biases, routers and convolutions.
    options: of the method, as its `quantize` has them: `double=True` for NF4, `group=32` for Int4.

  Raises:
    ValueError: for an unknown method, or an option that it does not have; when no matrix matches,
      one is quantised already or cannot be, as one of integers, one whose inputs a block does not
      divide, or, where values are known, one that holds NaN or infinity.

  Example:
    >>> import jax.numpy as jnp
    >>> params = {"up": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
    >>> small = quantize(params)
    >>> type(small["up"]["kernel"]).__name__, trees.nbytes(params), trees.nbytes(small)
    ('Int8', 160, 96)
    >>> quantize(params, "int4", group=2)["up"]["kernel"]
    Int4[4, 8] float32
  """
  chosen = representer(method, options)
  found = trees.matrices(params, targets)
  for path, leaf in found.items():
    if is_weight(leaf):
      raise ValueError(f"{path} is {type(leaf).__name__} already; allowed: plain arrays")

  def represent(path: str, leaf: Any) -> Weight:
    try:
      return chosen(path, leaf)
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


def fake_quantize(
  params: PyTree, method: str = "int8", targets: Chooser = TARGETS, **options: Any
) -> PyTree:
  """`params` with each targeted matrix rounded to what `quantize` would make of it; still arrays.

  As a view of what is trained it is quantisation-aware training: the loss is that of the rounded
  matrices, and its gradient goes straight through to the ones that are rounded (Jacob et al., arXiv
  1712.05877; Bengio et al., arXiv 1308.3432). What it computes is what the model computes once it
  is quantised, for methods that round weights alone.

  Args:
    params, method, targets, options: as for `quantize`.

  Raises:
    ValueError: as `quantize`.

  Example:
    >>> import jax.numpy as jnp
    >>> w = {"kernel": jnp.array([[0.75, 127.0]]).T}
    >>> fake_quantize(w)["kernel"].tolist()
    [[1.0], [127.0]]
    >>> jax.grad(lambda w: fake_quantize(w)["kernel"].sum())(w)["kernel"].tolist()
    [[1.0], [1.0]]
  """
  found = trees.matrices(params, targets)
  small = trees.items(quantize(jax.lax.stop_gradient(params), method, targets, **options))
  change = lambda path, w: _straight(w, small[path].materialize())
  return trees.update(params, lambda path, leaf: path in found, change)


@jax.custom_jvp
def _straight(w: Array, rounded: Array) -> Array:
  """`rounded`, whose derivative is that of w; w + (rounded − w) would be rounded once more."""
  return rounded


@_straight.defjvp
def _straight_jvp(primals, tangents):
  return _straight(*primals), tangents[0]
