"""Numbers, ids and sizes, checked where they are known.

Python's numbers, numpy's and JAX's arrays are known wherever they are not traced, and get the same
checks. What is traced cannot be refused. It is never read as something else: what would have been
refused gives NaN, or whatever else a function says. Sizes of arrays are known too, but for those
that `jax.export` has a symbol for.
"""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.typing import Array, Bool, Dim, Integer, Number


def known(x: Any) -> np.ndarray | None:
  """The values of an array, or None where they are traced or lie on other hosts.

  Example:
    >>> known(jnp.ones(2)).tolist(), jax.eval_shape(lambda x: known(x), jnp.ones(2))
    ([1.0, 1.0], None)
  """
  if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
    return None
  return np.asarray(x)


def number(
  name: str,
  value: Any,
  *,
  of: str | None = None,
  integer: bool = False,
  least: Number | None = None,
  above: Number | None = None,
  most: Number | None = None,
  below: Number | None = None,
  shape: tuple[int, ...] = (),
) -> Any:
  """`value` as a number of Python where it is known, and as it is where it is traced.

  Numbers are Python's, numpy's, and arrays without axes. A boolean is none.

  Args:
    name, of: what a message calls it, and whose it is.
    value: the number.
    integer: whether floats are refused, whole ones too.
    least, above, most, below: bounds, value ≥ least, > above, ≤ most, < below.
    shape: of arrays that are allowed besides; one is given back as it is.

  Raises:
    ValueError: for what is no number, NaN, infinite or out of bounds.

  Example:
    >>> number("rank", np.int64(8), integer=True, least=1), number("alpha", np.float32(0.5), most=1)
    (8, 0.5)
    >>> number("rank", 2.5, integer=True, least=1, most=8)
    Traceback (most recent call last):
    ValueError: rank 2.5; allowed: 1 … 8, an integer
  """
  values: Any = known(value) if _is_array(value) else value
  if not _fits(value, integer, shape) or (
    values is not None and not np.all(_within(values, least, above, most, below))
  ):
    allowed = _allowed(integer, least, above, most, below)
    shown = name + f" {_shown(value)}" if of is None else f"{of}: {name}={_shown(value)}"
    raise ValueError(f"{shown}; allowed: {allowed}")
  scalar = isinstance(values, np.ndarray | np.generic) and not values.ndim
  return values.item() if scalar else value


def check_ids(
  name: str,
  ids: Integer[Array | np.ndarray, "..."],
  count: int,
  where: Bool[Array | np.ndarray, "..."] | None = None,
) -> None:
  """Refuses ids out of 0 … count − 1 where they are known.

  Args:
    name: what a message calls them.
    ids: an array of integers.
    count: how many there are.
    where: False at ids that nobody reads; None checks all.

  Raises:
    ValueError: for ids that are no integers or, where they are known and read, out of range.

  Example:
    >>> check_ids("tokens", np.array([3, -100]), 4, where=np.array([True, False]))
    >>> check_ids("tokens", np.array([3, -100]), 4)
    Traceback (most recent call last):
    ValueError: tokens: id -100 at [1]; allowed: 0 to 3
  """
  if not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(f"{name}: {ids.dtype}{list(ids.shape)}; allowed: integers")
  values, read = known(ids), True if where is None else known(where)
  if values is None or read is None:
    return
  outside = np.argwhere(read & ((values < 0) | (values >= count)))
  if len(outside):
    place = tuple(outside[0].tolist())
    raise ValueError(f"{name}: id {values[place]} at {list(place)}; allowed: 0 to {count - 1}")


def check_fits(name: str, ids: Integer[Array | np.ndarray, "..."]) -> None:
  """Refuses integers of numpy that JAX would cut to fewer bits, which makes others of them.

  Raises:
    ValueError: for one that does not fit the type that JAX has for them.

  Example:
    >>> check_fits("segment_ids", np.array([0, 2**32]))
    Traceback (most recent call last):
    ValueError: segment_ids: 4294967296 at [1]; allowed: integers of int32
  """
  kept = jax.typeof(ids).dtype
  if not isinstance(ids, np.ndarray) or ids.dtype == kept:
    return
  lost = np.argwhere(ids != ids.astype(kept))
  if len(lost):
    place = tuple(lost[0].tolist())
    raise ValueError(f"{name}: {ids[place]} at {list(place)}; allowed: integers of {kept.name}")


def is_id(ids: Integer[Array | np.ndarray, "..."], count: int) -> Any:
  """Whether each of `ids` is one of 0 … count − 1, a boolean for each."""
  return (ids >= 0) & (ids < count)


def is_size(*sizes: Dim) -> bool:
  """Whether all of these are known, and none is a symbol of `jax.export`.

  Example:
    >>> is_size(1, 2), is_size(1, *jax.export.symbolic_shape("b"))
    (True, False)
  """
  return all(isinstance(size, int | np.integer) for size in sizes)


def more(size: Dim, other: Dim) -> bool:
  """Whether it is known that size > other, for sizes.

  Example:
    >>> (b,) = jax.export.symbolic_shape("b")
    >>> more(3, 2), more(b, 2), more(b, 0)
    (True, False, True)
  """
  try:
    return bool(size > other)
  except jax.errors.InconclusiveDimensionOperation:
    return False


def indices(start: Dim, stop: Dim) -> Any:
  """int32 start … stop − 1, an array of numpy, or of JAX where one of them is a symbol.

  Example:
    >>> indices(2, 5)
    array([2, 3, 4], dtype=int32)
  """
  return (np if is_size(start, stop) else jnp).arange(start, stop, dtype=np.int32)


def _is_array(value: Any) -> bool:
  return hasattr(value, "shape") and hasattr(value, "dtype")


def _fits(value: Any, integer: bool, shape: tuple[int, ...]) -> bool:
  """Whether it is a number, or an array of them of an allowed shape."""
  if _is_array(value):
    kinds = (jnp.integer,) if integer else (jnp.integer, jnp.floating)
    typed = any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    return typed and tuple(value.shape) in ((), shape)
  return isinstance(value, int if integer else int | float) and not isinstance(value, bool)


def _within(x: Any, least, above, most, below) -> list:
  bounds = ((operator.ge, least), (operator.gt, above), (operator.le, most), (operator.lt, below))
  return [abs(x) < math.inf] + [holds(x, bound) for holds, bound in bounds if bound is not None]


def _allowed(integer: bool, least, above, most, below) -> str:
  bounds = {"from": least, "above": above, "up to": most, "below": below}
  parts = [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
  if least is not None and most is not None:
    parts = [f"{least} … {most}"]
  return ", ".join((parts or ["finite numbers"]) + ["an integer"] * integer)


def _shown(value: Any) -> str:
  if not _is_array(value):
    return repr(value)
  values = known(value)
  if values is None or values.ndim:
    return f"{value.dtype}{list(value.shape)}"
  return repr(values.item())
