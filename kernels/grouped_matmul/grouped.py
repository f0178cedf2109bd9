"""One of several weights for each row, standing where one weight stood."""

import functools
from typing import Any

import jax.numpy as jnp

from effjax.core import spmd
from effjax.core.typing import Array, Dim, Float, PyTree
from effjax.core.weights import Over, materialize, register, transpose
from effjax.kernels.grouped_matmul.grouped_linear import grouped_linear
from effjax.kernels.grouped_matmul.groups import Groups


@register(static=("length",), kind="wrapper")
class Grouped(Over):
  """W[e] for the rows of group e: a module that is given these computes E modules at once.

  A matrix multiplies by `grouped_linear`, and a vector, such as a bias or the scale of a norm,
  gives each row its own. There is no one array that it is.

  Invariants:
    base: [E, …], an array or `Weight`; the shape is without E.
    sizes: rows of each group, [E] or [P, E], or `Groups`, as in `grouped_linear`.
    length: M; activations are [..., D] of M rows in the order of the groups.

  Example:
    >>> w = Grouped(jnp.array([[[1.0]], [[10.0]]]), jnp.array([1, 2]), 3)
    >>> w.shape, w.matmul(jnp.ones((3, 1))).tolist()
    ((1, 1), [[1.0], [10.0], [10.0]])
  """

  sizes: PyTree
  length: Dim

  def check(self) -> None:
    if len(self.base.shape) not in (2, 3):
      given = f"Grouped: base has shape {tuple(self.base.shape)}"
      raise ValueError(f"{given}; allowed: vectors [E, F] and matrices [E, D, F]")

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.base.shape[1:])

  def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    return self._affine(x, None)

  def affine(self, x: Float[Array, "... D"], bias: Any) -> Float[Array, "... F"]:
    return (
      self._affine(x, materialize(bias.base))
      if isinstance(bias, Grouped)
      else super().affine(x, bias)
    )

  def along(self, x: Float[Array, "... F"]) -> Float[Array, "... F"]:
    self._check_rows(x)
    take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)  # 0 where no group is
    of_row = lambda group, base: take(base, group)
    group, base = Groups.of(self.sizes).of_row(self.length), materialize(self.base)
    return spmd.map_rows(of_row, group, base).reshape(*x.shape[:-1], *self.shape)

  @property
  def T(self) -> "Grouped":
    return Grouped(transpose(self.base), self.sizes, self.length)

  def materialize(self) -> Array:
    raise ValueError(
      f"{self!r} is another array for each row; allowed: linear(x, w, bias) and along(vector, x)"
    )

  def _affine(self, x: Array, bias: PyTree) -> Array:
    self._check_rows(x)
    rows = x.reshape(self.length, x.shape[-1])
    return grouped_linear(rows, self.base, self.sizes, bias).reshape(*x.shape[:-1], self.shape[-1])

  def _check_rows(self, x: Array) -> None:
    if x.size != self.length * x.shape[-1]:
      given = f"activations {x.shape} against {self!r}"
      raise ValueError(f"{given}; allowed: {self.length} rows, as many as were sorted by group")
