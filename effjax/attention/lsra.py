"""Long-short range attention: half the channels attend, half convolve.

Lite Transformer (arXiv 2004.11886), section 4. The convolutions are those of "Pay less attention"
(arXiv 1901.10430), section 3.
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from effjax.attention import masks
from effjax.attention.kv_cache import Int8Rows, empty, put
from effjax.attention.multi_head import Attention
from effjax.core.numerics import zero_unless
from effjax.core.typing import Array, DTypeLike, Float, Int, PyTree
from effjax.core.weights import materialize
from effjax.layers import Context, Linear, Rope, weight, without_padding
from effjax.layers.axes import linear_axes, renamed, under
from effjax.layers.meshes import on_any_mesh

TAPS_INIT = nn.initializers.xavier_uniform()


def convolve(
  x: Float[Array, "B T D"],
  taps: Float[Array, "#B #T N W"],
  *,
  causal: bool,
  segment_ids: Int[Array, "#B T"] | None = None,
) -> Float[Array, "B T D"]:
  """y_t = Σ_j softmax(taps_t)_j x_{t + j − left} by depth; the channels of a head share the taps.

  left is W − 1 when causal, else (W − 1) / 2. What lies outside of a token's own segment counts as
  zero, so packed sequences do not mix; the softmax is over all W taps even so. Lightweight
  convolution has one set of taps, [1, 1, N, W]; dynamic convolution one for each position. Summed
  in float32.

  Args:
    x: [B, T, D].
    taps: before the softmax; head n is for channels n·D/N … (n+1)·D/N − 1.
    causal: whether it looks back only.
    segment_ids: [B, T]; a negative one is padding, which gives nothing and gets zeros.

  Raises:
    ValueError: for an even W when not causal, or heads N that do not divide D.

  Example:
    >>> convolve(jnp.arange(4.0).reshape(1, 4, 1), jnp.zeros((1, 1, 1, 2)), causal=True).ravel()
    Array([0. , 0.5, 1.5, 2.5], dtype=float32)

  Reference: "Pay less attention with lightweight and dynamic convolutions", equations 3 to 7.
  """
  width = taps.shape[-1]
  check_width(width, causal)
  left = width - 1 if causal else width // 2
  right = width - 1 - left
  pad = lambda a, fill: jnp.pad(
    a, [(0, 0), (left, right)] + [(0, 0)] * (a.ndim - 2), constant_values=fill
  )
  if segment_ids is not None and taps.shape[1] == x.shape[1]:
    taps = zero_unless(segment_ids >= 0, taps)
  shift = lambda a, j: jax.lax.slice_in_dim(a, j, j + x.shape[1], axis=1)
  ids = None if segment_ids is None else pad(segment_ids, -1)

  def read(x, j):
    if segment_ids is None:
      return shift(x, j)
    return zero_unless((shift(ids, j) == segment_ids) & (segment_ids >= 0), shift(x, j))

  # Without recomputation the backward pass would keep W shifted copies of x.
  return jax.checkpoint(lambda x, taps: _weighted(lambda j: read(x, j), taps))(pad(x, 0), taps)


def convolve_cached(
  inputs: Float[Array, "B S D"], taps: Float[Array, "#B #T N W"], positions: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
  """The causal `convolve` at `positions`, reading inputs that lie in a cache by position."""

  def read(j):
    at = positions - (taps.shape[-1] - 1) + j
    x = jnp.take_along_axis(inputs, jnp.maximum(at, 0)[..., None], axis=1, mode="clip")
    return zero_unless(at >= 0, x)

  return _weighted(read, taps)


def check_width(width: int, causal: bool) -> None:
  """Raises ValueError unless a convolution may have `width` taps."""
  if width < 1 or (not causal and width % 2 == 0):
    allowed = "from 1" if causal else "odd numbers, the convolution being centred"
    raise ValueError(f"convolution: kernel={width} with causal={causal}; allowed: {allowed}")


def _weighted(read, taps: Array) -> Array:
  """Σ_j softmax(taps)_j read(j), where read(j) is [B, T, D]."""
  heads, width = taps.shape[-2:]
  weights = jax.nn.softmax(taps.astype(jnp.float32), axis=-1)
  total = jnp.zeros((), jnp.float32)
  for j in range(width):
    x = read(j)
    if x.shape[-1] % heads:
      raise ValueError(f"convolution: {heads} heads; allowed: divisors of {x.shape[-1]} channels")
    by_head = x.reshape(*x.shape[:-1], heads, -1).astype(jnp.float32)
    total = total + weights[..., j, None] * by_head
  return total.reshape(x.shape).astype(x.dtype)


@struct.dataclass
class LSRACache:
  """The keys and values of one half, and what the other half convolves, by position."""

  attention: PyTree
  inputs: Float[Array, "... B S C"] | Int8Rows


class LSRA(nn.Module):
  """y = [Attention(x_1), convolve(GLU(x_2 W_glu)) W_out] for the halves x = [x_1, x_2].

  GLU(a, b) = a · sigmoid(b). Parameters: "attention", those of an `Attention` of width D / 2;
  "glu" [D/2, D] and "out" [D/2, D/2]; and the taps: "conv" [heads, kernel], or, with `dynamic`,
  the projection "taps" [D/2, heads·kernel].

  Attributes:
    heads: of the attention and of the convolution, a divisor of D / 2.
    kernel: taps W of the convolution (3, 7, 15, then 31 by depth in the paper); odd unless causal.
    causal: whether both halves look back only.
    dynamic: whether each token has taps of its own, projected from it.
    rope: rotary positions of the attention, or None.
    implementation: as in `attend`.

  Reference: Lite Transformer, section 4; decoding keeps half as many keys and values, and the
  inputs of the convolution.
  """

  rewinds: ClassVar[bool] = True

  heads: int
  kernel: int = 31
  causal: bool = True
  dynamic: bool = False
  rope: Rope | None = None
  implementation: str | None = None

  @on_any_mesh
  @nn.compact
  @without_padding
  def __call__(
    self, x: Float[Array, "B T D"], context: Context = Context(), cache: LSRACache | None = None
  ) -> tuple[Float[Array, "B T D"], LSRACache | None]:
    half = self._half(x.shape[-1])
    if cache is not None:
      context = context.after(x, cache.attention.ends)
    far, near = jnp.split(x, 2, axis=-1)
    attention = self._attention(name="attention")
    far, kv_cache = attention(far, context, None if cache is None else cache.attention)
    value, gate = jnp.split(Linear(2 * half, name="glu")(near), 2, axis=-1)
    near = value * jax.nn.sigmoid(gate)
    taps = self._taps(near)
    if cache is None:
      near = convolve(near, taps, causal=self.causal, segment_ids=context.segment_ids)
    else:
      length = cache.attention.written.shape[1]
      inputs = put(cache.inputs, near, context.slots_for(x, length))
      near = convolve_cached(inputs.astype(x.dtype), taps, context.positions_for(x))
      near = jnp.where(context.lost(x, length)[..., None], jnp.nan, near)
      cache = LSRACache(kv_cache, inputs)
    return jnp.concatenate([far, Linear(half, name="out")(near)], axis=-1), cache

  def _taps(self, x: Array) -> Array:
    if not self.dynamic:
      return materialize(weight(self, "conv", TAPS_INIT, (self.heads, self.kernel)))[None, None]
    taps = Linear(self.heads * self.kernel, kernel_init=TAPS_INIT, name="taps")(x)
    return taps.reshape(*x.shape[:-1], self.heads, self.kernel)

  def init_cache(
    self, width: int, batch: int, length: int, dtype: DTypeLike = jnp.float32
  ) -> LSRACache:
    """An empty cache of `length` slots for a model of `width`; `dtype` as in `Attention`.

    Raises:
      ValueError: when not `causal`, and for a type of neither floats nor int8.
    """
    if not self.causal:
      raise ValueError("LSRA: a cache with causal=False; allowed: causal=True")
    half = self._half(width)
    attention = self._attention(parent=None).init_cache(half, batch, length, dtype)
    return LSRACache(attention, empty((batch, length, half), dtype))

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    attention = renamed(self._attention(parent=None).axes, embed="far")
    taps = {"conv": ("channels", "taps")}
    if self.dynamic:
      taps = linear_axes("taps", "channels", "head_taps")
    convolution = linear_axes("glu", "near", "glu") | linear_axes("out", "channels", "near")
    return under("attention", attention) | convolution | taps

  @property
  def units(self) -> dict[str, int]:
    """How many heads the axes hold, see `effjax.layers.axes`."""
    convolution = {"channels": self.heads, "head_taps": self.heads}
    return self._attention(parent=None).units | convolution

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """FLOPs of matrix products and of the convolution for a token, forward."""
    half = self._half(width)
    taps = 2.0 * half * self.heads * self.kernel if self.dynamic else 0.0
    convolution = 6.0 * half**2 + taps + 2.0 * half * self.kernel
    return self._attention(parent=None).flops(half, length, queries) + convolution

  def _attention(self, **place) -> Attention:
    mask = masks.Causal() if self.causal else masks.Full()
    rope, implementation = self.rope, self.implementation
    return Attention(self.heads, mask=mask, rope=rope, implementation=implementation, **place)

  def _half(self, width: int) -> int:
    check_width(self.kernel, self.causal)
    if width % (2 * self.heads):
      raise ValueError(f"LSRA: heads={self.heads}; allowed: divisors of half the width, {width}/2")
    return width // 2
