"""Ternary matrices in less than a bit a weight: codes of a dictionary, a row after the other."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from effjax.core import numerics
from effjax.core.known import known
from effjax.core.register import register
from effjax.core.typing import Array, DTypeLike, Float, Int, Integer, Num, PyTree
from effjax.kernels.quantized_matmul.steps import outputs_at_once
from effjax.quant.basics import check_scales
from effjax.quant.calibrated import each_matrix
from effjax.quant.dictionary import decode, encode
from effjax.quant.packed import ByRows, lying


@register(static=("inputs", "most"), kind="quantised")
class Ternary(ByRows):
  """M[o, i] is the least number of its row, 0, or the largest: the nearest of them.

  QMoE's form (Frantar & Alistarh, arXiv 2310.16795): where ends of a row are as far out as those of
  a normal distribution, nine of ten numbers are 0, and `quant.dictionary` takes 0.8 bits for each.
  A row has 32 bits besides for where its codes begin, and its two numbers: 0.1 bits a weight where
  there are 1024 inputs. Other distributions cost more, up to 8 bits.

  How many codes there are depends on the numbers. They are encoded where these are known, not in a
  program, and decoded in programs: products expand some rows at a time, backward too.

  Invariants:
    codes: uint16 [..., N], the codes of all rows one after the other; N is what the matrix that
      needs most of them needs.
    starts: int32 [..., O], which code is the first of a row.
    values: [..., O, 2], the least number of a row, at most 0, and the largest, at least 0.
    inputs: I.
    most: codes that the longest row has.
  """

  codes: PyTree
  starts: PyTree
  values: PyTree
  inputs: int = dataclasses.field(kw_only=True)
  most: int = dataclasses.field(kw_only=True)

  @classmethod
  def quantize(
    cls,
    w: Num[Array | np.ndarray, "... D F"],
    *,
    scale_dtype: DTypeLike = jnp.float32,
    table: bool = False,
  ) -> "Ternary":
    """The nearest one of `w`; half of either end is 0.

    Args:
      w: matrices [..., D, F], inputs by outputs.
      scale_dtype: type of the values, float32 or bfloat16.
      table: whether w is a table of rows [..., V, D].

    Raises:
      ValueError: when `w` is traced, not a floating-point matrix, or holds NaN or infinity; for
        another type.

    Example:
      >>> w = Ternary.quantize(jnp.array([[4.0], [2.5], [2.0], [-0.5], [-1.0]]))
      >>> w.materialize().ravel().tolist(), w.codes.shape
      ([4.0, 4.0, 0.0, 0.0, -1.0], (1,))
    """
    check_encodable(w)
    m = lying(w, table, "block", 1)
    values = ends(m, scale_dtype)
    check_scales(values)
    return cls.of(nearest(m, values), values, dtype=jax.typeof(w).dtype, table=table)

  @classmethod
  def of(
    cls,
    symbols: Integer[Array | np.ndarray, "... O I"],
    values: Float[Array, "... O 2"],
    *,
    dtype: DTypeLike,
    table: bool = False,
  ) -> "Ternary":
    """The one whose numbers are 0 for symbol 0, values[…, 0] for 1, and values[…, 1] for 2.

    Raises:
      ValueError: for symbols that are traced.
    """
    check_encodable(symbols)
    *batch, outputs, inputs = symbols.shape
    rows = np.asarray(symbols, np.uint8).reshape(math.prod(batch) * outputs, inputs)
    codes, counts = encode(rows)
    counts = counts.reshape(math.prod(batch), outputs)
    starts = np.cumsum(counts, 1, dtype=np.int32) - counts
    each = counts.sum(1)
    held = np.zeros((len(each), max(1, each.max(initial=0))), np.uint16)
    held[np.arange(held.shape[1]) < each[:, None]] = codes
    return cls(
      jnp.asarray(held.reshape(*batch, held.shape[1])),
      jnp.asarray(starts.reshape(*batch, outputs)),
      values,
      inputs=inputs,
      most=int(max(1, counts.max(initial=0))),
      dtype=jnp.dtype(dtype),
      table=table,
    )

  def check(self) -> None:
    *batch, outputs = self.starts.shape
    for name, dtype, allowed in (
      ("codes", jnp.uint16, (*batch, *self.codes.shape[-1:])),
      ("starts", jnp.int32, (*batch, outputs)),
      ("values", self.values.dtype, (*batch, outputs, 2)),
    ):
      given = getattr(self, name)
      if tuple(given.shape) != allowed or given.dtype != dtype:
        raise ValueError(
          f"Ternary: {name} are {given.dtype}{list(given.shape)}; allowed: "
          f"{jnp.dtype(dtype)}{list(allowed)}"
        )

  @property
  def lying_shape(self) -> tuple[int, ...]:
    return (*self.starts.shape, self.inputs)

  def unpacked(self) -> Float[Array, "... O I"]:
    return each_matrix(lambda w: w._rows(w.starts, w.values), self.starts.ndim - 1, self)

  def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    if not math.prod(self.shape):
      return super().matmul(x)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return self._tiled(rows).astype(x.dtype).reshape(*x.shape[:-1], self.shape[-1])

  def lookup(self, indices: Int[Array, "..."]) -> Float[Array, "... F"]:
    return self.rows(indices) if self.table else super().lookup(indices)

  def rows(self, indices: Int[Array, "..."]) -> Float[Array, "... I"]:
    """M[indices] of one matrix."""
    flat = indices.reshape(-1)
    of = lambda x: jnp.take(x, flat, axis=0, mode="clip")
    found = self._rows(of(self.starts), of(self.values))
    return found.astype(self.dtype).reshape(*indices.shape, self.inputs)

  def specs(self, axes: Sequence[Any]) -> "Ternary":
    """As `Weight.specs`; the codes are not split but along leading axes."""
    *batch, first, last = axes
    outputs = first if self.table else last
    specs: Any = {"codes": (None,), "starts": (outputs,), "values": (outputs, None)}
    return dataclasses.replace(self, **{n: PartitionSpec(*batch, *s) for n, s in specs.items()})

  def _rows(self, starts: Int[Array, "R"], values: Float[Array, "R 2"]) -> Float[Array, "R I"]:
    """Rows that begin at codes `starts`."""
    at = starts[:, None] + jnp.arange(self.most, dtype=jnp.int32)[None]
    return numbers(decode(jnp.take(self.codes, at, mode="clip"), self.inputs), values)

  def _tiled(self, x: Float[Array, "M D"]) -> Float[Array, "M F"]:
    """x Mᵀ, or x M of a table, by tiles of rows, which are expanded once more for the gradient."""
    outputs, inputs = self.lying_shape
    size = outputs_at_once(outputs, 4 * inputs)
    count = -(-outputs // size)
    rows = jnp.minimum(jnp.arange(count * size), outputs - 1).reshape(count, size)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def product(w: Ternary, x: Array, rows: Array) -> Array:
      m = w.rows(rows)
      return numerics.matmul(x, m if w.table else m.T)

    if not self.table:
      y = jax.lax.map(lambda rows: product(self, x, rows), rows)
      return jnp.moveaxis(y, 0, 1).reshape(x.shape[0], count * size)[:, :outputs]
    parts = jnp.pad(x, ((0, 0), (0, count * size - outputs))).reshape(x.shape[0], count, size)
    add = lambda total, part: (total + product(self, *part).astype(total.dtype), None)
    total = jnp.zeros((x.shape[0], inputs), numerics.wide(x.dtype))
    total = numerics.vary_alike(total, x, self)
    return jax.lax.scan(add, total, (jnp.moveaxis(parts, 1, 0), rows))[0]


@functools.partial(jax.jit, static_argnames="dtype")
def ends(m: Float[Array, "... O I"], dtype: DTypeLike) -> Float[Array, "... O 2"]:
  """The least and the largest number of each row and 0.

  Raises:
    ValueError: for another type than float32 and bfloat16.
  """
  if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f"scale_dtype {jnp.dtype(dtype).name}; allowed: float32, bfloat16")
  return jnp.stack([m.min(-1, initial=0), m.max(-1, initial=0)], -1).astype(dtype)


@jax.jit
def nearest(m: Float[Array, "... I"], values: Float[Array, "... 2"]) -> Int[Array, "... I"]:
  """0 for what is nearest to 0, or as near; 1 and 2 for what is nearest to its row's values."""
  low, high = (values[..., i, None].astype(m.dtype) / 2 for i in range(2))
  return jnp.where(m > high, 2, jnp.where(m < low, 1, 0))


def numbers(symbols: Int[Array, "... I"], values: Float[Array, "... 2"]) -> Float[Array, "... I"]:
  """What the symbols stand for."""
  low, high = values[..., :1], values[..., 1:]
  return jnp.where(symbols == 1, low, jnp.where(symbols == 2, high, jnp.zeros_like(high)))


def check_encodable(w: Any) -> None:
  """Refuses what is traced.

  Raises:
    ValueError: for what is traced, or lies on other hosts.
  """
  if known(w) is None:
    raise ValueError(
      f"w is a traced {w.dtype}{list(w.shape)}; allowed: known numbers, outside of jit, since how "
      "many codes there are depends on them"
    )
