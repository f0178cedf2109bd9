"""Linear attention: a feature map in place of the softmax (arXiv 2006.16236)."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from effjax.core.known import more
from effjax.core.numerics import nan_unless, vary_alike, zero_unless
from effjax.core.typing import Array, DTypeLike, Float, Int
from effjax.layers import Context, Linear, without_padding
from effjax.layers.axes import linear_axes
from effjax.layers.meshes import on_any_mesh


@struct.dataclass
class LinearState:
  """What a sequence leaves behind: Σ φ(k) vᵀ, Σ φ(k), and the segment these are sums of.

  A new state is of segment −1, of which there are no tokens.
  """

  sums: Float[Array, "... B N H Hv"]
  norms: Float[Array, "... B N H"]
  segment: Int[Array, "... B"]

  @classmethod
  def empty(cls, batch: int, heads: int, width: int, value_width: int) -> "LinearState":
    """The state before the first token, in float32."""
    sums = jnp.zeros((batch, heads, width, value_width), jnp.float32)
    return cls(sums, sums[..., 0], jnp.full((batch,), -1, jnp.int32))


def feature_map(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """φ(x) = elu(x) + 1 in float32: x + 1 for x > 0 and exp(x) below, to full relative precision."""
  x = x.astype(jnp.float32)
  return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def linear_attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T N H"],
  value: Float[Array, "B T N Hv"],
  *,
  causal: bool = True,
  segment_ids: Int[Array, "#B T"] | None = None,
  state: LinearState | None = None,
  chunk: int = 64,
) -> tuple[Float[Array, "B T N Hv"], LinearState]:
  """y_t = φ(q_t)ᵀ Σ_s φ(k_s) v_sᵀ / φ(q_t)ᵀ Σ_s φ(k_s), over s ≤ t or, not causal, all s.

  A scan carries the sums from chunk to chunk; within a chunk scores are computed. Time and memory
  grow linearly with T, and there is one H × Hv matrix a chunk. All sums are in float32.

  Args:
    query, key, value: [B, T, N, H].
    causal: whether a token sees the ones before it and itself only.
    segment_ids: [B, T]; a token sees its own segment only, whose tokens must stand together;
      negative ids are padding, wherever it stands: it gives nothing and gets zeros.
    state: what the tokens before left behind, in the causal form; they count as the tokens of one
      segment, `state.segment` (0 where there were no ids).
    chunk: tokens a step of the scan.

  Returns:
    y [B, T, N, Hv] in the type of `query`, and the state after the last token.

  Raises:
    ValueError: for a chunk below 1, or a state without `causal`.

  Example:
    >>> x = jax.random.normal(jax.random.key(0), (1, 6, 2, 4))
    >>> attention = jax.jit(linear_attention)
    >>> whole, _ = attention(x, x, x)
    >>> _, state = attention(x[:, :5], x[:, :5], x[:, :5])
    >>> last, _ = attention(x[:, 5:], x[:, 5:], x[:, 5:], state=state)
    >>> bool(jnp.allclose(last, whole[:, 5:], atol=1e-6))
    True

  Reference: "Transformers are RNNs", sections 3.2–3.4, equations 9 to 12 and 18 to 20.
  """
  if chunk < 1:
    raise ValueError(f"linear_attention: chunk={chunk}; allowed: from 1")
  if state is not None and not causal:
    raise ValueError("linear_attention: state with causal=False; allowed: causal=True, or None")
  B, T, N, H = query.shape
  if state is None:
    state = LinearState.empty(B, N, H, value.shape[-1])
  ids = jnp.zeros((1, T), jnp.int32) if segment_ids is None else segment_ids
  ids = _chunks(jnp.broadcast_to(ids, (B, T)).astype(jnp.int32), chunk, -1)
  token = ids >= 0
  cut = lambda x: zero_unless(token, _chunks(x, chunk))
  q, k = (zero_unless(token, feature_map(cut(x))) for x in (query, key))
  v = cut(value).astype(jnp.float32)
  last, before = _scan_states(k, v, ids, state)
  parts = [_within(q, k, v, ids, causal), _from_state(q, ids, before)]
  if not causal:
    parts.append(_from_state(q, ids, _scan_states(k, v, ids, state, reverse=True)[1]))
  total, norm = (sum(x) for x in zip(*parts, strict=True))
  sound = jnp.isfinite(total).all(-1) & jnp.isfinite(norm)
  some = sound & (norm > 0)
  y = zero_unless(some, total) / jnp.where(some, norm, 1)[..., None]
  y = nan_unless(sound, y)
  return jnp.moveaxis(y, 0, 1).reshape(B, -1, *y.shape[3:])[:, :T].astype(query.dtype), last


def _chunks(x: Array, chunk: int, fill: int = 0) -> Array:
  """[B, T, ...] as [G, B, C, ...], filled up at the end."""
  chunk = x.shape[1] if more(chunk, x.shape[1]) else chunk
  count = -(-x.shape[1] // chunk)
  x = jnp.pad(
    x, [(0, 0), (0, count * chunk - x.shape[1])] + [(0, 0)] * (x.ndim - 2), constant_values=fill
  )
  return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)


def _scan_states(k, v, ids, state: LinearState, *, reverse: bool = False):
  """The state after all chunks, and the one that each chunk starts from."""

  def step(state, chunk):
    return _absorb(state, *chunk, reverse), state

  return jax.lax.scan(step, vary_alike(state, k, v, ids), (k, v, ids), reverse=reverse)


def _absorb(state: LinearState, k, v, ids, reverse: bool) -> LinearState:
  """The state after a chunk [B, C, ...]: of the segment that its last token is in."""
  token = ids >= 0
  place = jnp.argmax(token, 1) if reverse else ids.shape[1] - 1 - jnp.argmax(token[:, ::-1], 1)
  segment = jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0]
  segment = jnp.where(token.any(1), segment, state.segment)
  k, v = (zero_unless(ids == segment[:, None], x) for x in (k, v))
  same = (segment == state.segment)[:, None, None]
  return LinearState(
    jnp.where(same[..., None], state.sums, 0) + jnp.einsum("bsnh,bsnv->bnhv", k, v),
    jnp.where(same, state.norms, 0) + k.sum(1),
    segment,
  )


def _within(q, k, v, ids, causal: bool) -> tuple[Array, Array]:
  """Numerator and denominator from the keys of the query's own chunk.

  A product over the chunk would carry what is not finite to tokens that do not see it: it is left
  out, and who sees it gets NaN.
  """
  seen = ids[:, :, :, None] == ids[:, :, None, :]
  if causal:
    seen &= jnp.tril(jnp.ones(seen.shape[-2:], bool))[None, None]
  sound = [jnp.isfinite(x).all(-1) for x in (q, k, v)]
  q, k, v = (zero_unless(whole, x) for whole, x in zip(sound, (q, k, v), strict=True))
  scores = jnp.where(seen[:, :, None], jnp.einsum("gbtnh,gbsnh->gbnts", q, k), 0)
  lost = ~(sound[1] & sound[2])
  seen_lost = jnp.einsum("gbts,gbsn->gbtn", seen.astype(q.dtype), lost.astype(q.dtype)) > 0
  norm = nan_unless(sound[0] & ~seen_lost, jnp.moveaxis(scores.sum(-1), 2, 3))
  return jnp.einsum("gbnts,gbsnv->gbtnv", scores, v), norm


def _from_state(q, ids, state: LinearState) -> tuple[Array, Array]:
  """Numerator and denominator from the keys of other chunks."""
  own = ids == state.segment[..., None]
  q = zero_unless(own, q)
  total = jnp.einsum("gbtnh,gbnhv->gbtnv", q, state.sums)
  norm = jnp.einsum("gbtnh,gbnh->gbtn", q, state.norms)
  return zero_unless(own, total), zero_unless(own, norm)


class LinearAttention(nn.Module):
  """y = Concat_n linear_attention(q_n, k_n, v_n) · W_out; cost linear in the length.

  Parameters: "query", "key", "value" and "out" [D, D]. The cache is a `LinearState`, whose size
  does not depend on the length. It absorbs each token that is there, in order, whatever
  `context.positions` says, and cannot give one back.

  Attributes:
    heads: N, a divisor of D.
    causal, chunk: as in `linear_attention`.
  """

  rewinds: ClassVar[bool] = False

  heads: int
  causal: bool = True
  chunk: int = 64

  @on_any_mesh
  @nn.compact
  @without_padding
  def __call__(
    self,
    x: Float[Array, "B T D"],
    context: Context = Context(),
    cache: LinearState | None = None,
  ) -> tuple[Float[Array, "B T D"], LinearState | None]:
    head_width = self._head_width(x.shape[-1])
    ids = context.segment_ids
    if cache is not None and ids is not None:
      ids = jnp.where(ids < 0, -1, 0)
    split = lambda y: y.reshape(*y.shape[:-1], self.heads, head_width)
    query, key, value = (
      split(Linear(x.shape[-1], name=name)(x)) for name in ("query", "key", "value")
    )
    y, state = linear_attention(
      query,
      key,
      value,
      causal=self.causal,
      segment_ids=ids,
      state=cache,
      chunk=self.chunk,
    )
    y = Linear(x.shape[-1], name="out")(y.reshape(x.shape))
    return y, None if cache is None else state

  def init_cache(
    self, width: int, batch: int, length: int, dtype: DTypeLike = jnp.float32
  ) -> LinearState:
    """An empty state for a model of `width`, in float32; `length` and `dtype` have no influence.

    Raises:
      ValueError: when not `causal`.
    """
    if not self.causal:
      raise ValueError("LinearAttention: a cache with causal=False; allowed: causal=True")
    head_width = self._head_width(width)
    return LinearState.empty(batch, self.heads, head_width, head_width)

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    found = linear_axes("out", "heads", "embed")
    for name in ("query", "key", "value"):
      found |= linear_axes(name, "embed", "heads")
    return found

  @property
  def units(self) -> dict[str, int]:
    """How many heads the axes hold, see `effjax.layers.axes`."""
    return {"heads": self.heads}

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward: projections, chunks, and the sums of each side.

    The last `queries` tokens come to a state that holds the others.
    """
    tokens = queries if queries and self.causal else length
    chunk, sides = min(self.chunk, tokens), 1 if self.causal else 2
    pairs = (chunk + 1) / 2 if self.causal else chunk
    return 8.0 * width**2 + 4.0 * width * (pairs + sides * self._head_width(width))

  def _head_width(self, width: int) -> int:
    if width % self.heads:
      raise ValueError(
        f"LinearAttention: heads={self.heads}; allowed: divisors of the width, {width}"
      )
    return width // self.heads
