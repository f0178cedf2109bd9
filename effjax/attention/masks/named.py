"""What a function of your own may read beside positions: arrays by name, its head and batch row."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.attention.masks.base import Features, at_least
from effjax.core.known import known
from effjax.core.typing import Dim


class ByValue:
  """A pytree that is hashable and equal by value, its arrays included.

  What is traced has no value: such an array equals itself alone, and with one there is no hash.
  """

  def __eq__(self, other: object) -> bool:
    if self is other or type(self) is not type(other):
      return self is other
    return _value(self) == _value(other)

  def __hash__(self) -> int:
    if any(known(x) is None for x in jax.tree.leaves(self)):
      raise TypeError(f"unhashable: this {type(self).__name__} holds arrays that are traced")
    return hash(_value(self))


def _value(tree: Any) -> tuple[Any, ...]:
  """What tells a tree from others: its structure and, of each array, all there is to know."""
  leaves: list[Any]
  leaves, structure = jax.tree.flatten(tree)
  values = (known(x) for x in leaves)
  content = (
    id(x) if value is None else (value.shape, value.dtype, value.tobytes())
    for x, value in zip(leaves, values, strict=True)
  )
  return structure, *content


def rebuilt(data: str, *static: str) -> Callable[[type], type]:
  """Registers a dataclass as a pytree whose field `data` is data, rebuilt without `__init__`."""

  def flatten(x: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return (getattr(x, data),), tuple(getattr(x, name) for name in static)

  def register(cls: type) -> type:
    def unflatten(values: Any, children: Any) -> Any:
      x: Any = object.__new__(cls)
      for name, value in zip((data, *static), (*children, *values), strict=True):
        object.__setattr__(x, name, value)
      return x

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)
    return cls

  return register


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["queries", "keys", "distances"],
  meta_fields=["heads", "batch"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Named(ByValue):
  """Arrays by name, and the numbers of heads and batch rows if these are told.

  Attributes:
    queries: [B or 1, N or 1, T or 1], of each query.
    keys: [B or 1, N or 1, S], of each key.
    distances: [B or 1, N or 1, 2·R + 1], of distances from −R to R.
    heads, batch: N and B where the function is given `head` and `batch`, else None.
  """

  queries: dict[str, Any]
  keys: dict[str, Any]
  distances: dict[str, Any]
  heads: int | None
  batch: int | None

  @classmethod
  def of(
    cls, owner: str, heads: int | None, batch: int | None, **given: Mapping[str, Any] | None
  ) -> "Named":
    """From what is given of each kind.

    Raises:
      ValueError: a name given twice, one that has a meaning, or what is no array of rank 3.
    """
    told: dict[str, Any] = {"heads": heads, "batch": batch}
    for name, count in told.items():
      if count is not None:
        at_least(f"{owner}: {name}", count, 1, " or None where the function reads none")
        told[name] = int(count)
    kinds: dict[str, Any] = {kind: dict(arrays or {}) for kind, arrays in given.items()}
    names = ["q", "k", "head", "batch", *(name for arrays in kinds.values() for name in arrays)]
    for kind, arrays in kinds.items():
      for name, x in arrays.items():
        if names.count(name) > 1 or not name.isidentifier():
          raise ValueError(f"{owner}: {kind} names an array {name!r}; allowed: a name of its own")
        if len(getattr(x, "shape", ())) != 3:
          what = getattr(x, "shape", type(x).__name__)
          raise ValueError(
            f"{owner}: {kind} has {name} of {what}; allowed: an array [batch, heads, length]"
          )
    return cls(**({"distances": {}} | kinds), **told)

  @property
  def most_heads(self) -> int:
    """How many heads the indices and arrays tell apart."""
    arrays = (*self.queries.values(), *self.keys.values(), *self.distances.values())
    return max([self.heads or 1, *(x.shape[1] for x in arrays)])

  def features(self) -> tuple[Features, Features]:
    """What is known of queries and of keys, as of `Mask.features`."""
    told: dict[str, Any] = {}
    if self.heads is not None:
      told["head"] = np.arange(self.heads, dtype=np.int32)[None, :, None]
    if self.batch is not None:
      told["batch"] = np.arange(self.batch, dtype=np.int32)[:, None, None]
    return told | self.queries, self.keys

  def check(self, owner: str, batch: Dim, T: Dim, S: Dim) -> None:
    """Raises ValueError where something does not fit these sizes."""
    if self.batch not in (None, 1, batch):
      raise ValueError(f"{owner} tells {self.batch} batch rows apart, and query has {batch}")
    n, lengths = self.most_heads, {"queries": (1, T), "keys": (S,), "distances": None}
    for kind, length in lengths.items():
      for name, x in getattr(self, kind).items():
        fits = x.shape[2] % 2 == 1 if length is None else x.shape[2] in length
        if x.shape[0] not in (1, batch) or x.shape[1] not in (1, n) or not fits:
          last = "odd" if length is None else " or ".join(map(str, sorted(set(length))))
          raise ValueError(
            f"{owner}: {kind} has {name} of shape {x.shape}, expected "
            f"({batch} or 1, {n} or 1, {last})"
          )

  def check_function(self, owner: str, function: Callable[..., Any], boolean: bool) -> None:
    """Raises ValueError for one that reads other arrays, is not elementwise or gives another type.

    Kernels can take no arrays but those given by name.
    """
    pairs = (1, 1, 1, 3, 2)  # of batch rows, heads in groups, queries and keys
    place = lambda shape, x: jax.ShapeDtypeStruct(shape, x.dtype)
    columns, rows = (functools.partial(place, (1, 1, 1, *n)) for n in ((3, 1), (1, 2)))
    queries, keys = self.features()
    arrays = {
      **{name: columns(x) for name, x in queries.items()},
      **{name: rows(x) for name, x in keys.items()},
      **{name: place(pairs, x) for name, x in self.distances.items()},
    }
    index = np.zeros((), np.int32)
    call = lambda q, k, arrays: function(q, k, **arrays)
    traced = jax.make_jaxpr(call)(columns(index), rows(index), arrays)
    read = [f"{jnp.shape(x)} of {x.dtype}" for x in traced.consts]
    if read:
      raise ValueError(
        f"{owner}: its function reads an array {', '.join(read)} from outside; give it by name as "
        f"queries= or keys=, by which kernels can take it"
      )
    found = [x.dtype.name for x in traced.out_avals]
    if len(found) != 1 or (found == ["bool"]) != boolean:
      allowed = "booleans" if boolean else "numbers"
      raise ValueError(
        f"{owner}: its function gives {' and '.join(found) or None}; allowed: {allowed}"
      )
    (shape,) = (x.shape for x in traced.out_avals)
    axes = zip(reversed(shape), reversed(pairs), strict=False)
    if len(shape) > len(pairs) or any(n not in (1, most) for n, most in axes):
      raise ValueError(f"{owner}: its function gives {shape} for pairs {pairs}; allowed: the same")
