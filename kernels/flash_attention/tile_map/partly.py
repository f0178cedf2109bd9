"""Pytrees of which some arrays are known while tracing, and so are part of the program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.known import known
from effjax.core.typing import PyTree


class _Constant:
  """An array of numpy that is hashable, and equal by value."""

  def __init__(self, value: np.ndarray):
    self.value, self._key = value, (value.shape, value.dtype.str, value.tobytes())

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Constant) and self._key == other._key

  def __hash__(self) -> int:
    return hash(self._key)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Partly:
  """A pytree whose children are what is data of it; hashable where nothing is.

  A custom derivative makes tracers of all arrays it is given, those that a mask was made with
  outside of any tracing too.

  Attributes:
    data: the leaves that are data.
    structure: of the whole.
    constants: for each leaf the array of numpy that it is, or None.
  """

  data: tuple[Any, ...]
  structure: Any
  constants: tuple[_Constant | None, ...]

  @classmethod
  def of(cls, tree: PyTree) -> "Partly":
    """What is known of `tree` while a program is traced; all is data where none is.

    Example:
      >>> run = jax.jit(lambda x: len(Partly.of((x, np.ones(2))).data))
      >>> int(run(1.0))
      1
    """
    leaves, structure = jax.tree.flatten(tree)
    traced = isinstance(jnp.zeros(()), jax.core.Tracer)
    values = [known(x) if traced else None for x in leaves]
    constants = tuple(None if x is None else _Constant(x) for x in values)
    data = tuple(x for x, value in zip(leaves, values, strict=True) if value is None)
    return cls(data, structure, constants)

  @property
  def tree(self) -> Any:
    """The whole, with arrays of numpy where they are known."""
    data = iter(self.data)
    leaves = [next(data) if x is None else x.value for x in self.constants]
    return jax.tree.unflatten(self.structure, leaves)

  def tree_flatten(self):
    return self.data, (self.structure, self.constants)

  @classmethod
  def tree_unflatten(cls, known_parts, data):
    return cls(tuple(data), *known_parts)
