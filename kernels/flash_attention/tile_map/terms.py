"""What is added to scores, in the form kernels read: arrays to cut into tiles, and a term on tiles.

With T queries that are the last of S positions the pairs of one distance lie on a diagonal, and a
tile needs rows + columns − 1 neighbouring entries of a line of distances. With positions given, or
symbols for sizes, an entry has to be looked up for each pair.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effjax.core.known import indices, is_size
from effjax.core.numerics import zero_unless
from effjax.core.typing import Array, Dim


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["queries", "keys", "line", "softcap", "start"],
  meta_fields=["structure", "trains", "diagonal", "T", "S"],
)
@dataclasses.dataclass(frozen=True)
class Terms:
  """A score (`effjax.attention.scores`) over T queries and S keys, and a soft cap that is data.

  Attributes:
    queries: pytree of [b, n, T or 1], what the score has to know of each query.
    keys: pytree of [b, n, S], of each key.
    line: pytree of [b, n, L], of each distance; b and n are 1 or the whole here too. If `diagonal`,
      L = T + S − 1 and the pair of row r and key k has entry r − k + S − 1. Else L = 2·S − 1 and a
      query at position q has with key k the entry clip(q − k, 1 − S, S − 1) + S − 1.
    softcap: a scalar that is known when running alone, or None.
    start: () or two integers: the positions in the whole of what are query and key 0 here.
    structure: of the score as a pytree, or None for no score.
    trains: for each leaf of (queries, keys, line) whether it has a derivative.
  """

  queries: Any
  keys: Any
  line: Any
  softcap: Any  # not checked here: jax rebuilds trees with leaves of other types
  start: tuple[Any, ...]
  structure: Any
  trains: tuple[bool, ...]
  diagonal: bool
  T: Dim
  S: Dim

  @classmethod
  def of(
    cls, score: Any, softcap: Any, T: Dim, S: Dim, positions: Any, dtype: Any
  ) -> "Terms | None":
    """For T queries and S keys, floats as `dtype`; None without a score or a cap that is data.

    To be called outside of custom derivatives: those of the score's own arrays then follow from
    those of what is returned.
    """
    softcap = jnp.asarray(softcap, dtype) if isinstance(softcap, jax.Array) else None
    if score is None and softcap is None:
      return None
    diagonal = positions is None and is_size(T, S)
    if positions is None:
      positions = indices(S - T, S)[None]
    queries = keys = line = ()
    if score is not None:
      queries, keys = score.features(positions, S)
      line = score.line(indices(1 - (T if diagonal else S), S))
    # What numpy holds is part of the program.
    data = lambda x: not isinstance(x, np.ndarray) and jnp.issubdtype(x.dtype, jnp.floating)
    trains = tuple(map(data, jax.tree.leaves((queries, keys, line))))
    cast = functools.partial(_cast, dtype=dtype)
    queries, keys, line = jax.tree.map(cast, (queries, keys, line))
    structure = None if score is None else jax.tree.structure(score)
    return cls(queries, keys, line, softcap, (), structure, trains, diagonal, T, S)

  @property
  def heads(self) -> int:
    """How many heads it tells apart."""
    arrays = jax.tree.leaves((self.queries, self.keys, self.line))
    return max((x.shape[1] for x in arrays), default=1)

  def value(self, queries: Any, keys: Any, line: Any, q: Any, k: Any) -> Any:
    """What the score adds on a tile, from its part of the arrays and the positions q and k.

    All of them broadcast against each other; the last two axes are those of queries and keys.
    `line` has the entries of the pairs.
    """
    # What a term needs of the score's arrays has become features, so it gets none.
    score = jax.tree.unflatten(self.structure, [None] * self.structure.num_leaves)
    if self.start:
      q, k = q + self.start[0], k + self.start[1]
    return score.term(q, k, queries, keys, line)

  def dense(self, positions: Any, seen: Array | None = None) -> Array:
    """All that the score adds, [b, n, T or 1, S or 1]; positions [b, T] as given to `of`.

    Of arrays it reads zeros for pairs that are not `seen` [b, n, T, S].
    """
    if positions is None:
      positions = indices(self.S - self.T, self.S)[None]
    q = positions[:, None, :, None]
    k = indices(0, self.S)[None, None, None]
    if self.diagonal:
      pairs = functools.partial(diagonals, rows=self.T, columns=self.S)
    else:
      pairs = functools.partial(entries, q=q, k=k, length=self.S)
    return jnp.asarray(
      self.value(
        jax.tree.map(lambda x: zero_unless(seen, x[..., :, None]), self.queries),
        jax.tree.map(lambda x: zero_unless(seen, x[..., None, :]), self.keys),
        jax.tree.map(lambda x: zero_unless(seen, pairs(jnp.asarray(x))), self.line),
        q,
        k,
      )
    )

  def padded(self, rows: int, columns: int) -> "Terms":
    """For whole tiles, up to `rows` queries and `columns` keys, by repeating what is at the end.

    On a diagonal the entry of row r and key k is then r − k + columns − 1: rows r … r + n − 1 and
    keys k … k + m − 1 need n + m − 1 entries from r − k + columns − m on.
    """
    more_rows, more_columns = rows - self.T, columns - self.S
    arrays = {
      "queries": jax.tree.map(
        lambda x: x if x.shape[2] == 1 else _edge(x, 0, more_rows), self.queries
      ),
      "keys": jax.tree.map(lambda x: _edge(x, 0, more_columns), self.keys),
    }
    if self.diagonal:
      arrays["line"] = jax.tree.map(lambda x: _edge(x, more_columns, more_rows), self.line)
    return dataclasses.replace(self, **arrays)

  def shard(self, query: Any, key: Any, length: int) -> "Terms":
    """Of `length` queries from row `query` on and as many keys from `key` on, both data or not."""
    cut = lambda x, start, size: lax.dynamic_slice_in_dim(jnp.asarray(x), start, size, axis=2)
    return dataclasses.replace(
      self,
      queries=jax.tree.map(lambda x: x if x.shape[2] == 1 else cut(x, query, length), self.queries),
      keys=jax.tree.map(lambda x: cut(x, key, length), self.keys),
      line=jax.tree.map(lambda x: cut(x, query - key + self.S - length, 2 * length - 1), self.line),
      start=(query, key),
      T=length,
      S=length,
    )

  @property
  def trained(self) -> list[Array]:
    """The arrays that have a derivative: leaves of queries, keys and line, then the soft cap."""
    leaves = jax.tree.leaves((self.queries, self.keys, self.line))
    chosen = [x for x, trains in zip(leaves, self.trains, strict=True) if trains]
    return chosen if self.softcap is None else [*chosen, self.softcap]

  def with_trained(self, arrays: Any) -> "Terms":
    """The same with these in place of `trained`."""
    return self._with(arrays, jax.tree.leaves((self.queries, self.keys, self.line)))

  def gradient(self, arrays: Any) -> "Terms":
    """What a custom derivative gives for terms: these for `trained`, None for the rest."""
    return dataclasses.replace(self._with(arrays, [None] * len(self.trains)), start=())

  def _with(self, trained: Any, others: Any) -> "Terms":
    rest = iter(trained)
    pairs = zip(self.trains, others, strict=True)
    leaves = [next(rest) if trains else x for trains, x in pairs]
    tree = jax.tree.structure((self.queries, self.keys, self.line))
    queries, keys, line = jax.tree.unflatten(tree, leaves)
    softcap = None if self.softcap is None else next(rest)
    return dataclasses.replace(self, queries=queries, keys=keys, line=line, softcap=softcap)


def diagonals(line: Array, rows: int, columns: int) -> Array:
  """[..., rows + columns − 1] as a tile [..., rows, columns] of the entries r − k + columns − 1.

  Example:
    >>> diagonals(jnp.arange(4), 2, 3).tolist()
    [[2, 1, 0], [3, 2, 1]]
  """
  # Repeated with a period of one more than a row's length, each row begins one entry earlier.
  lead, length = line.shape[:-1], rows + columns - 1
  padded = jnp.concatenate([line[..., ::-1], line[..., :1]], axis=-1)
  repeated = jnp.broadcast_to(padded[..., None, :], (*lead, rows, length + 1))
  flat = repeated.reshape(*lead, rows * (length + 1))[..., : rows * length]
  return flat.reshape(*lead, rows, length)[..., rows - 1 :]


def entries(line: Array, q: Any, k: Any, length: Dim) -> Array:
  """[..., 2 · length − 1] at the distances of q and k, [..., t, s] together: [..., t, s]."""
  at = jnp.clip(q - k, 1 - length, length - 1) + length - 1
  flat = at.reshape(*at.shape[:-2], -1)
  found = jnp.take_along_axis(line, flat, axis=-1, mode="clip")
  return found.reshape(*found.shape[:-1], *at.shape[-2:])


def _cast(x: Any, dtype: Any) -> Array:
  floating = jnp.issubdtype(x.dtype, jnp.floating)
  return jnp.asarray(x, dtype if floating else None)


def _edge(x: Any, before: int, after: int) -> Any:
  return jnp.pad(x, ((0, 0), (0, 0), (before, after)), mode="edge") if before or after else x
