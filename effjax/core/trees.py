"""Parameter trees addressed by path.

A path is the keys joined by "/", as in "segments_0/layers_0/mixer/query/kernel". A pattern is a
regular expression that must occur in the path (`re.search`). `select`, `update` and `count` see a
`Weight` as one leaf; `partition` and `nbytes` see the arrays inside it, so that one can train the
two factors of a LoRA weight and leave its base alone: ".../kernel/a".
"""

import hashlib
import math
import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import weights
from effjax.core.typing import Key, PyTree
from effjax.core.weights import Weight, is_weight

Chooser = str | Callable[[str, Any], bool]


def path_string(path) -> str:
  """ "a/b/c" of a JAX key path."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def items(params: PyTree) -> dict[str, Any]:
  """Path → leaf, a `Weight` being a leaf."""
  leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight)
  return {path_string(path): leaf for path, leaf in leaves}


def select(params: PyTree, pattern: Chooser) -> dict[str, Any]:
  """The leaves whose path matches, as path → leaf.

  Raises:
    ValueError: when nothing matches.

  Example:
    >>> select({"query": {"kernel": 1}, "out": {"kernel": 2}}, "query|key")
    {'query/kernel': 1}
  """
  chosen = {path: leaf for path, leaf in items(params).items() if chooses(pattern, path, leaf)}
  if not chosen:
    raise ValueError(f"pattern {pattern!r} matches no parameter; paths: {some(items(params))}")
  return chosen


def update(params: PyTree, pattern: Chooser, change: Callable[[str, Any], Any]) -> PyTree:
  """`params` with `change(path, leaf)` in place of each leaf that `select` would give.

  Example:
    >>> update({"a": 1, "b": 2}, "b", lambda path, leaf: leaf * 10)
    {'a': 1, 'b': 20}
  """
  chosen = select(params, pattern)

  def visit(path, leaf):
    name = path_string(path)
    return change(name, leaf) if name in chosen else leaf

  return jax.tree_util.tree_map_with_path(visit, params, is_leaf=is_weight)


def matrices(params: PyTree, targets: Chooser, exclude: Chooser | None = None) -> dict[str, Any]:
  """The matrices among what `targets` selects and `exclude` does not, as path → leaf.

  A matrix is an array or `Weight` of at least two axes, not named "bias" or "scale": under a
  scanned segment a bias [R, F] has two axes too, and `targets="query"` means the kernel alone.

  Raises:
    ValueError: when nothing is left, or nothing of it is a matrix, or one is not of floats, or
      `exclude` leaves out nothing.

  Example:
    >>> import jax.numpy as jnp
    >>> params = {"query": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    >>> list(matrices(params, "query"))
    ['query/kernel']
  """
  chosen = select(params, targets)
  kept = {p: x for p, x in chosen.items() if exclude is None or not chooses(exclude, p, x)}
  if exclude is not None and len(kept) == len(chosen):
    raise ValueError(f"exclude {exclude!r} matches none of the targets {some(chosen)}")
  if not kept:
    raise ValueError(f"exclude {exclude!r} leaves nothing of {some(chosen)}")
  found = {p: x for p, x in kept.items() if _is_matrix(p, x)}
  if not found:
    shapes = (f"{path} {leaf.dtype}{list(leaf.shape)}" for path, leaf in kept.items())
    raise ValueError(f"targets {targets!r} selects no matrix [..., D, F], but {some(shapes)}")
  for path, leaf in found.items():
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
      raise ValueError(f"{path} is {leaf.dtype}{list(leaf.shape)}; allowed: matrices of floats")
  return found


def partition(params: PyTree, pattern: Chooser) -> tuple[PyTree, PyTree]:
  """Two trees of the same structure: the matching arrays, and the rest; None elsewhere.

  None is an empty subtree to JAX: gradients and optimiser states of the first tree exist only for
  what was chosen.

  Example:
    >>> partition({"a": 1, "b": 2}, "a")
    ({'a': 1, 'b': None}, {'a': None, 'b': 2})
  """
  paths = jax.tree_util.tree_leaves_with_path(params)
  if not any(chooses(pattern, path_string(p), x) for p, x in paths):
    arrays = some(path_string(path) for path, _ in paths)
    raise ValueError(f"pattern {pattern!r} matches no parameter; paths: {arrays}")

  def keep(wanted):
    return lambda path, x: x if chooses(pattern, path_string(path), x) == wanted else None

  tree_map = jax.tree_util.tree_map_with_path
  return tree_map(keep(True), params), tree_map(keep(False), params)


def merge(*trees: PyTree) -> PyTree:
  """The inverse of `partition`: at each place the one leaf that is not None.

  Example:
    >>> merge({"a": 1, "b": None}, {"a": None, "b": 2})
    {'a': 1, 'b': 2}
  """
  first = lambda *leaves: next((x for x in leaves if x is not None), None)
  return jax.tree.map(first, *trees, is_leaf=lambda x: x is None)


def trained(params: PyTree) -> frozenset[str]:
  """Paths of the arrays that train where nothing else is asked for.

  A representation says which of its fields do (`weights.register`). Where a tree holds adapters,
  those alone train; else every array of floats does, but for what quantised weights hold.

  Example:
    >>> import jax.numpy as jnp
    >>> sorted(trained({"w": jnp.ones((2, 3)), "ids": jnp.ones(3, int)}))
    ['w']
  """
  found = [each for path, leaf in items(params).items() for each in weights.trained(path, leaf)]
  adapters = [path for path, kind in found if kind == "adapter"]
  return frozenset(adapters or [path for path, _ in found])


def drawn(params: PyTree, key: Key) -> PyTree:
  """`params` as one step of training has them: each weight draws its randomness, such as dropout.

  Each path draws from a key of its own, whatever else is there.
  """

  def of(path, leaf):
    return leaf.drawn(path_key(key, path_string(path))) if is_weight(leaf) else leaf

  return jax.tree_util.tree_map_with_path(of, params, is_leaf=is_weight)


def path_key(key: Key, path: str) -> Key:
  """A key for what is drawn at `path`."""
  return jax.random.fold_in(key, zlib.crc32(path.encode()))


def digests(params: PyTree) -> dict[str, str]:
  """Path → type, shape and a hash of the bytes of each parameter, a `Weight` being one.

  Example:
    >>> import numpy as np
    >>> digests({"w": np.ones(3, np.float32)})
    {'w': 'float32 [3] 82c3cafeca1f2512'}
  """
  return {path: _digest(leaf) for path, leaf in items(params).items()}


def count(params: PyTree) -> int:
  """Logical parameters: a quantised weight counts as the matrix it stands for; shapes suffice.

  An array of integers, such as a table of ids, holds none.

  Example:
    >>> import jax.numpy as jnp
    >>> count({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
    9
  """
  return sum(_size(leaf) for leaf in items(params).values())


def nbytes(params: PyTree) -> int:
  """Bytes held by all arrays, scales and indices included; shapes suffice.

  Example:
    >>> import jax.numpy as jnp
    >>> nbytes({"w": jnp.ones((2, 3), jnp.bfloat16)})
    12
  """
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params))


def chooses(pattern: Chooser, path: str, leaf) -> bool:
  """Whether a pattern or predicate selects the leaf at `path`."""
  return bool(pattern(path, leaf) if callable(pattern) else re.search(pattern, path))


def is_table(path: str) -> bool:
  """Whether the parameter at `path` is a table of rows: it is named "embedding"."""
  return path.rsplit("/", 1)[-1] == "embedding"


def _digest(leaf) -> str:
  digest = hashlib.sha256()
  for path, x in jax.tree_util.tree_leaves_with_path(leaf):
    array = np.ascontiguousarray(x)
    digest.update(f"{path_string(path)} {array.dtype} {array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
  kind = type(leaf).__name__ if is_weight(leaf) else str(leaf.dtype)
  return f"{kind} {list(leaf.shape)} {digest.hexdigest()[:16]}"


def _size(leaf) -> int:
  if isinstance(leaf, Weight):
    return leaf.parameters
  return 0 if jnp.issubdtype(leaf.dtype, jnp.integer) else math.prod(leaf.shape)


def _is_matrix(path: str, leaf) -> bool:
  return path.rsplit("/", 1)[-1] not in ("bias", "scale") and len(leaf.shape) >= 2


def some(names: Iterable[str], limit: int = 8) -> str:
  """The first `limit` names and how many there are, for messages.

  Example:
    >>> some(["a", "b", "c"], 2)
    'a, b, … (3 in all)'
  """
  names = list(names)
  return ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")
