"""Linformer: attention whose keys and values are projected along the length (arXiv 2006.04768)."""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from effjax.attention.attend import attend
from effjax.core import numerics
from effjax.core.typing import Array, DTypeLike, Float, Int
from effjax.core.weights import materialize
from effjax.layers import Context, Linear, weight, without_padding
from effjax.layers.axes import linear_axes
from effjax.layers.linear import KERNEL_INIT
from effjax.layers.meshes import on_any_mesh


def project_length(
  x: Float[Array, "B T N H"], w: Any, segment_ids: Int[Array, "#B T"] | None = None
) -> Float[Array, "B R N H"]:
  """y[r] = Σ_t w[t, r] x[t], over the positions t that are tokens.

  Args:
    x: [B, T, N, H].
    w: [M, R] with M ≥ T, an array or a `Weight`; its first T rows are used.
    segment_ids: [B, T]; a position with a negative one counts as zero. None is no padding.

  Raises:
    ValueError: when x is longer than the M positions that w is for.

  Example:
    >>> project_length(jnp.ones((1, 3, 1, 1)), jnp.ones((4, 2)))[0, :, 0, 0].tolist()
    [3.0, 3.0]

  Reference: Linformer, section 4, equation 7.
  """
  length = x.shape[1]
  if length > w.shape[0]:
    raise ValueError(f"Linformer: sequence of length {length}; allowed: up to {w.shape[0]}")
  if segment_ids is not None:
    x = jnp.where((segment_ids >= 0)[..., None, None], x, jnp.zeros((), x.dtype))
  wide = numerics.wide(x.dtype)  # half precision would lose the sum
  y = jnp.einsum("btnh,tr->brnh", x.astype(wide), materialize(w)[:length].astype(wide))
  return y.astype(x.dtype)


def linformer_attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S N H"],
  value: Float[Array, "B S N H"],
  key_map: Any,
  value_map: Any,
  *,
  segment_ids: Int[Array, "#B T"] | None = None,
  causal: bool = False,
  implementation: str | None = None,
) -> Float[Array, "B T N H"]:
  """softmax(q (Eᵀk)ᵀ / √H) Fᵀv: T × R scores in place of T × T.

  Args:
    query, key, value: [B, T, N, H] of one sequence a row.
    key_map, value_map: E and F, [M, R] with M ≥ T, arrays or `Weight`s; may be the same.
    segment_ids: [B, T]; a negative one is padding, which gives nothing and gets zeros. All other
      ids count as one: a projected key mixes the whole row, so rows must not be packed, which
      cannot be checked here.
    causal: only False.
    implementation: as in `attend`.

  Raises:
    ValueError: with `causal`, or when a sequence is longer than the projections are made for.

  Example:
    >>> x, e = jnp.ones((1, 6, 2, 4)), jnp.ones((8, 3))
    >>> linformer_attention(x, x, x, e, e).shape
    (1, 6, 2, 4)

  Reference: Linformer, section 4.
  """
  if causal:
    raise ValueError(
      "Linformer: causal=True; allowed: False, since a projected key holds all positions"
    )
  key = project_length(key, key_map, segment_ids)
  value = project_length(value, value_map, segment_ids)
  pair = None
  if segment_ids is not None:
    pair = jnp.where(segment_ids < 0, -1, 0), jnp.zeros((1, key.shape[1]), jnp.int32)
  return attend(query, key, value, segment_ids=pair, implementation=implementation)


class Linformer(nn.Module):
  """y = Concat_n softmax(q_n (Eᵀk_n)ᵀ / √H) Fᵀv_n · W_out; cost linear in the length.

  Each row is one sequence, with or without padding, of at most `length` positions; a shorter one
  uses the first rows of E and F. Parameters: "query", "key", "value" and "out" [D, D];
  "key_length" and, unless `shared`, "value_length" [length, rank], which the heads share.

  Attributes:
    heads: N, a divisor of D.
    length: the longest sequence M.
    rank: projected positions R.
    shared: E = F (key-value sharing, section 4).
    causal: only False: a projected key holds all positions.
    implementation: as in `attend`.
  """

  rewinds: ClassVar[bool] = True

  heads: int
  length: int
  rank: int
  shared: bool = False
  causal: bool = False
  implementation: str | None = None

  @on_any_mesh
  @nn.compact
  @without_padding
  def __call__(
    self, x: Float[Array, "B T D"], context: Context = Context(), cache: Any = None
  ) -> tuple[Float[Array, "B T D"], None]:
    _check(self, x.shape[-1], cache)
    split = lambda y: y.reshape(*y.shape[:-1], self.heads, x.shape[-1] // self.heads)
    query, key, value = (
      split(Linear(x.shape[-1], name=name)(x)) for name in ("query", "key", "value")
    )
    key_map = LengthMap(self.length, self.rank, name="key_length")()
    value_map = key_map
    if not self.shared:
      value_map = LengthMap(self.length, self.rank, name="value_length")()
    y = linformer_attention(
      query,
      key,
      value,
      key_map,
      value_map,
      segment_ids=context.segment_ids,
      causal=self.causal,
      implementation=self.implementation,
    )
    return Linear(x.shape[-1], name="out")(y.reshape(x.shape)), None

  def init_cache(self, width: int, batch: int, length: int, dtype: DTypeLike = jnp.float32):
    """There is none: raises ValueError."""
    raise ValueError("Linformer: a cache; allowed: none, since it sees all positions at once")

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    found = linear_axes("out", "heads", "embed")
    for name in ("query", "key", "value"):
      found |= linear_axes(name, "embed", "heads")
    for name in ("key_length",) if self.shared else ("key_length", "value_length"):
      found |= linear_axes(name, "positions", "projected")
    return found

  @property
  def units(self) -> dict[str, int]:
    """How many heads the axes hold, see `effjax.layers.axes`."""
    return {"heads": self.heads}

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward: projections of width and length, and scores."""
    return 8.0 * width**2 + 8.0 * width * self.rank


class LengthMap(nn.Module):
  """The matrix "kernel" [length, rank], an array or a `Weight`."""

  length: int
  rank: int

  @nn.compact
  def __call__(self) -> Any:
    return weight(self, "kernel", KERNEL_INIT, (self.length, self.rank))


def _check(module: Linformer, width: int, cache: Any) -> None:
  if width % module.heads:
    raise ValueError(f"Linformer: heads={module.heads}; allowed: divisors of the width, {width}")
  if cache is not None:
    module.init_cache(width, 0, 0)
