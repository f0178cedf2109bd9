"""Multi-head attention (arXiv 1706.03762), with shared key-value heads (GQA, arXiv 2305.13245)."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from effjax.attention import masks, prefixed
from effjax.attention.attend import attend
from effjax.attention.kv_cache import KVCache, empty
from effjax.attention.scores import Score
from effjax.core.typing import Array, Dim, DTypeLike, Float
from effjax.core.weights import materialize
from effjax.layers import Context, Linear, RMSNorm, Rope, taps, weight, without_padding
from effjax.layers.axes import linear_axes
from effjax.layers.meshes import on_any_mesh
from effjax.layers.prefix import TrainedPrefix


class Attention(nn.Module):
  """y = Concat_n softmax(scale · q_n k_nᵀ) v_n · W_out, over the keys that `mask` shows.

  Parameters: "query" [D, N·H], "key" and "value" [D, K·H], "out" [N·H, D]; "query_norm" and
  "key_norm" [H] with `qk_norm`, [N·H] and [K·H] where it is joint; "sinks" [N] with `sinks`; those
  of `prefixed` with `prefix`. The taps "query_tap" [B, T, N, H] and "key_tap" [B, S, K, H] see the
  factors of the scores.

  Attributes:
    heads: query heads N.
    kv_heads: key-value heads K, a divisor of N; None means N (MHA), 1 is MQA.
    head_width: H; None means D / N.
    mask: who attends to whom.
    rope: rotary positions, or None.
    use_bias, out_bias: biases on query/key/value, and on the output.
    qk_norm: epsilon of an RMS norm on each query and key head (arXiv 2302.05442), or None.
    qk_norm_joint: whether that norm is one over all heads (OLMoE, arXiv 2409.02060).
    scale: factor of the scores; None means H^(−1/2).
    logit_softcap: caps the scores, see `numerics.softcap`.
    scores: what is added to them at the tokens' places in the sequence, as in `attend`, or None.
      Its arrays are not among the parameters; a loss that makes the module of them trains them.
    sinks: whether each head learns the score of a key without value, as in `attend`; 0 at first.
    prefix: trained keys and values before the tokens, or None.
    cross: keys and values come from `context.memory`.
    implementation: as in `attend`.
  """

  rewinds: ClassVar[bool] = True
  takes_prefix: ClassVar[bool] = True

  heads: int
  kv_heads: int | None = None
  head_width: int | None = None
  mask: masks.Mask = masks.Causal()
  rope: Rope | None = None
  use_bias: bool = False
  out_bias: bool = False
  qk_norm: float | None = None
  qk_norm_joint: bool = False
  scale: float | None = None
  logit_softcap: float | None = None
  scores: Score | None = None
  sinks: bool = False
  prefix: TrainedPrefix | None = None
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
    queries: Float[Array, "B T N H"] | None = None,
  ) -> tuple[Float[Array, "B T D"] | Float[Array, "B T N H"], KVCache | None]:
    """y and the new cache; of given `queries`, what each of them attends to, in place of y."""
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

    self.check_prefix()
    prefixed.check_unread(self)
    source = source.astype(x.dtype)
    if cache is not None:
      context = context.after(x, cache.ends)
    positions = context.positions_for(x)
    places = positions if self.prefix is None else self.prefix.places(positions)
    query = self._project("query", x, self.heads, width) if queries is None else queries
    query = self._placed("query", query, places)
    with taps.tokens(context.memory_segment_ids if self.cross else context.segment_ids):
      key, value = (self._project(name, source, kv_heads, width) for name in ("key", "value"))
      key = self._placed("key", key, places)
    if self.sinks:
      weight(self, "sinks", nn.initializers.zeros, (self.heads,))
    out, cache = self._attend(x, query, key, value, positions, context, cache)
    if queries is not None:
      return out, cache
    out = out.reshape(*out.shape[:-2], self.heads * width)
    return Linear(x.shape[-1], self.out_bias, name="out")(out), cache

  @property
  def reads(self) -> tuple[str, ...]:
    """The fields of `Context` that it reads besides segments and positions."""
    memory = ("memory", "memory_segment_ids") if self.cross else ()
    return (*memory, "attributes") if self.attributes else memory

  @property
  def causal(self) -> bool:
    """Whether no token sees what comes after it, as far as `mask` is known to hide it."""
    return self.mask.causal

  @property
  def attributes(self) -> int:
    """From how many modules the attributes of a row choose."""
    return 0 if self.prefix is None else self.prefix.modules

  def check_prefix(self) -> None:
    """Raises ValueError where there is a prefix and it cannot have one."""
    prefixed.check(self, self.takes_prefix)

  def _with_prefix(self, tokens: Callable[..., Any], query, positions, context) -> Array:
    """What `tokens(return_lse=…)` attends to, joined with what is seen of the prefix."""
    arguments = self._arguments | {"sinks": None}
    return prefixed.joined(self, tokens, query, positions, context, **arguments)

  def _project(self, name: str, x: Array, heads: int, width: int) -> Array:
    y = Linear(heads * width, self.use_bias, name=name)(x)
    return y.reshape(*y.shape[:-1], heads, width)

  def _placed(self, name: str, x: Float[Array, "B T N H"], positions: Array) -> Array:
    """Queries or keys as they enter the scores: normalised and rotated, where so asked."""
    if self.qk_norm is not None:
      rows = x.reshape(*x.shape[:-2], -1) if self.qk_norm_joint else x
      x = RMSNorm(self.qk_norm, name=f"{name}_norm")(rows).reshape(x.shape)
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
    seen = functools.partial(attend, query, key, value, **self._arguments)
    joined = lambda tokens: self._with_prefix(tokens, query, positions, context)
    if self.cross:
      segments = _pair(context.segment_ids, context.memory_segment_ids, query, key)
      return joined(functools.partial(seen, mask=None, segment_ids=segments)), cache
    if cache is None:
      mask, segments = self._mask(context, key.shape[1]), context.segment_ids
      return joined(functools.partial(seen, mask=mask, segment_ids=segments)), None
    length = cache.written.shape[1]
    cache = cache.write(key, value, context.slots_for(x, length))
    key, value = cache.key.astype(query.dtype), cache.value.astype(query.dtype)
    tokens = functools.partial(
      attend,
      query,
      key,
      value,
      mask=self._mask(context, length),
      segment_ids=_pair(context.segment_ids, jnp.where(cache.written, 0, -1), query, key),
      query_positions=positions,
      **self._arguments,
    )
    return jnp.where(context.lost(x, length)[..., None, None], jnp.nan, joined(tokens)), cache

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
    shape = (batch, length, *self.kv_shape(width))
    return KVCache(empty(shape, dtype), empty(shape, dtype), jnp.zeros((batch, length), bool))

  def kv_shape(self, width: int) -> tuple[int, int]:
    """Heads K and width H of the keys and values of a token, for a model of `width`."""
    return self._kv_heads(), self._head_width(width)

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    found = linear_axes("out", "heads", "embed", self.out_bias)
    for name, role in {"query": "heads", "key": "kv_heads", "value": "kv_heads"}.items():
      found |= linear_axes(name, "embed", role, self.use_bias)
    if self.qk_norm is not None:
      for name, heads in {"query": "heads", "key": "kv_heads"}.items():
        found[f"{name}_norm/scale"] = (heads if self.qk_norm_joint else "head_width",)
    for name, columns in {"key": "head_width", "value": "value_width"}.items():
      roles = ("virtual", "kv_heads", columns)
      if self.prefix is not None:
        found[f"prefix_{name}"] = roles
        found |= {f"module_{name}": ("modules", *roles)} if self.prefix.modules else {}
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
    keys = self._mean_keys(length, queries) + prefixed.mean_keys(self, length, queries)
    return projections + 4.0 * self.heads * head_width * keys

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
