"""Multi-head attention (arXiv 1706.03762), with shared key-value heads (GQA, arXiv 2305.13245)."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from effjax.attention import masks
from effjax.attention.attend import attend
from effjax.attention.kv_cache import KVCache, empty
from effjax.attention.scores import Score
from effjax.core.typing import Array, Dim, DTypeLike, Float
from effjax.core.weights import materialize
from effjax.layers import Context, Linear, RMSNorm, Rope, taps, weight, without_padding
from effjax.layers.axes import linear_axes
from effjax.layers.meshes import on_any_mesh


class Attention(nn.Module):
  """y = Concat_n softmax(scale · q_n k_nᵀ) v_n · W_out, over the keys that `mask` shows.

  Parameters: "query" [D, N·H], "key" and "value" [D, K·H], "out" [N·H, D]; "query_norm" and
  "key_norm" [H] with `qk_norm`; "sinks" [N] with `sinks`. The taps "query_tap" [B, T, N, H] and
  "key_tap" [B, S, K, H] see the factors of the scores.

  Attributes:
    heads: query heads N.
    kv_heads: key-value heads K, a divisor of N; None means N (MHA), 1 is MQA.
    head_width: H; None means D / N.
    mask: who attends to whom.
    rope: rotary positions, or None.
    use_bias, out_bias: biases on query/key/value, and on the output.
    qk_norm: epsilon of an RMS norm on each query and key head (arXiv 2302.05442), or None.
    scale: factor of the scores; None means H^(−1/2).
    logit_softcap: caps the scores, see `numerics.softcap`.
    scores: what is added to them at the tokens' places in the sequence, as in `attend`, or None.
      Its arrays are not among the parameters; a loss that makes the module of them trains them.
    sinks: whether each head learns the score of a key without value, as in `attend`; 0 at first.
    cross: keys and values come from `context.memory`.
    implementation: as in `attend`.
  """

  rewinds: ClassVar[bool] = True

  heads: int
  kv_heads: int | None = None
  head_width: int | None = None
  mask: masks.Mask = masks.Causal()
  rope: Rope | None = None
  use_bias: bool = False
  out_bias: bool = False
  qk_norm: float | None = None
  scale: float | None = None
  logit_softcap: float | None = None
  scores: Score | None = None
  sinks: bool = False
  cross: bool = False
  implementation: str | None = None

  @on_any_mesh
  @nn.compact
  @without_padding
  def __call__(
    self,
    x: Float[Array, "B T D"],
    context: Context = Context(),
    cache: KVCache | None = None,
  ) -> tuple[Float[Array, "B T D"], KVCache | None]:
    width = self._head_width(x.shape[-1])
    kv_heads = self._kv_heads()
    source = x if not self.cross else context.memory
    if source is None:
      raise ValueError("Attention: cross=True needs context.memory [B, S, D], and it is None")
    if self.cross and self.rope is not None:
      raise ValueError(
        "Attention: cross=True with rope; allowed: rope=None, memory has no positions"
      )
    if self.cross and self.scores is not None:
      raise ValueError(
        "Attention: cross=True with scores; allowed: scores=None, memory has no positions"
      )

    source = source.astype(x.dtype)
    if cache is not None:
      context = context.after(x, cache.ends)
    positions = context.positions_for(x)
    query = self._placed("query", self._project("query", x, self.heads, width), positions)
    with taps.tokens(context.memory_segment_ids if self.cross else context.segment_ids):
      key, value = (self._project(name, source, kv_heads, width) for name in ("key", "value"))
      key = self._placed("key", key, positions)
    if self.sinks:
      weight(self, "sinks", nn.initializers.zeros, (self.heads,))
    out, cache = self._attend(x, query, key, value, positions, context, cache)
    out = out.reshape(*out.shape[:-2], self.heads * width)
    return Linear(x.shape[-1], self.out_bias, name="out")(out), cache

  @property
  def reads(self) -> tuple[str, ...]:
    """The fields of `Context` that it reads besides segments and positions."""
    return ("memory", "memory_segment_ids") if self.cross else ()

  def _project(self, name: str, x: Array, heads: int, width: int) -> Array:
    y = Linear(heads * width, self.use_bias, name=name)(x)
    return y.reshape(*y.shape[:-1], heads, width)

  def _placed(self, name: str, x: Float[Array, "B T N H"], positions: Array) -> Array:
    """Queries or keys as they enter the scores: normalised and rotated, where so asked."""
    if self.qk_norm is not None:
      x = RMSNorm(self.qk_norm, name=f"{name}_norm")(x)
    if self.rope is not None:
      x = self.rope(x, positions)
    return taps.Tap(name=f"{name}_tap")(x)

  def _mask(self, context: Context, length: Dim) -> masks.Mask:
    """Who sees whom of `length` keys."""
    return self.mask

  @property
  def _arguments(self) -> dict:
    names = ("scale", "logit_softcap", "scores", "implementation")
    given = {name: getattr(self, name) for name in names}
    sinks = materialize(self.get_variable("params", "sinks")) if self.sinks else None
    return given | {"sinks": sinks}

  def _attend(self, x, query, key, value, positions, context, cache):
    arguments = self._arguments
    if self.cross:
      segments = _pair(context.segment_ids, context.memory_segment_ids, query, key)
      return attend(query, key, value, mask=None, segment_ids=segments, **arguments), cache
    if cache is None:
      mask, segments = self._mask(context, key.shape[1]), context.segment_ids
      return attend(query, key, value, mask=mask, segment_ids=segments, **arguments), None
    length = cache.written.shape[1]
    cache = cache.write(key, value, context.slots_for(x, length))
    key, value = cache.key.astype(query.dtype), cache.value.astype(query.dtype)
    out = attend(
      query,
      key,
      value,
      mask=self._mask(context, length),
      segment_ids=_pair(context.segment_ids, jnp.where(cache.written, 0, -1), query, key),
      query_positions=positions,
      **arguments,
    )
    return jnp.where(context.lost(x, length)[..., None, None], jnp.nan, out), cache

  def init_cache(
    self, width: int, batch: int, length: int, dtype: DTypeLike = jnp.float32
  ) -> KVCache | None:
    """An empty cache of `length` slots for a model of `width`; None for cross-attention.

    Args:
      dtype: in which keys and values are kept: floats, or int8 with a float32 scale for each token
        and head, see `kv_cache.Int8Rows`.

    Raises:
      ValueError: for another type.
    """
    if self.cross:
      return None
    shape = (batch, length, self._kv_heads(), self._head_width(width))
    return KVCache(empty(shape, dtype), empty(shape, dtype), jnp.zeros((batch, length), bool))

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    found = linear_axes("out", "heads", "embed", self.out_bias)
    for name, role in {"query": "heads", "key": "kv_heads", "value": "kv_heads"}.items():
      found |= linear_axes(name, "embed", role, self.use_bias)
    if self.qk_norm is not None:
      found |= {f"{name}_norm/scale": ("head_width",) for name in ("query", "key")}
    return found | {"sinks": ("heads",)} if self.sinks else found

  @property
  def units(self) -> dict[str, int]:
    """How many heads the axes hold, see `effjax.layers.axes`."""
    return {"heads": self.heads, "kv_heads": self._kv_heads()}

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward: projections, and scores over the keys it sees.

    Args:
      width: model width D.
      length: keys S.
      queries: how many of the last positions ask, on average over these; None means all.
    """
    head_width, kv_heads = self._head_width(width), self._kv_heads()
    projections = 2.0 * width * head_width * (2 * self.heads + 2 * kv_heads)
    return projections + 4.0 * self.heads * head_width * self._mean_keys(length, queries)

  def _mean_keys(self, length: int, queries: int | None) -> float:
    """Keys that one of the last `queries` tokens sees, on average."""
    return float(length) if self.cross else self.mask.mean_keys(length, queries)

  def _kv_heads(self) -> int:
    kv_heads = self.heads if self.kv_heads is None else self.kv_heads
    if self.heads % kv_heads:
      raise ValueError(f"Attention: kv_heads={kv_heads}; allowed: divisors of heads={self.heads}")
    return kv_heads

  def _head_width(self, width: int) -> int:
    if self.head_width is None and width % self.heads:
      raise ValueError(f"Attention: heads={self.heads} does not divide width {width}")
    return self.head_width or width // self.heads


def _pair(query_ids, key_ids, query, key):
  if query_ids is None and key_ids is None:
    return None
  same = lambda x: jnp.zeros(x.shape[:2], jnp.int32)
  # Every query that is a token sees every key that is one.
  join = lambda ids, x: same(x) if ids is None else jnp.where(ids < 0, -1, 0)
  return join(query_ids, query), join(key_ids, key)
