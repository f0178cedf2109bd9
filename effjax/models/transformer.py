"""Decoder-only, encoder-only and encoder-decoder Transformers from one stack of layers."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from effjax.core.known import check_ids, is_id, more
from effjax.core.numerics import softcap
from effjax.core.typing import Array, DTypeLike, Float, Int, PyTree
from effjax.layers import Context, Embed, Linear, sinusoidal_positions
from effjax.layers.meshes import on_any_mesh
from effjax.layers.spec import PLACES, LayerSpec, TransformerConfig, ask, check_attributes, facts
from effjax.layers.stack import Segment, segments

RNG_STREAMS = ("params", "dropout", "router", "mask")


class Layer(nn.Module):
  """Mixer, cross-attention and feed-forward, each in its residual and norm.

  What stands after the mixer or the feed-forward acts on what is about to be added to x: in "pre"
  x + after(f(norm(x))), in "post" norm(x + after(f(x))), in "sandwich" x + after(norm(f(norm(x)))).
  """

  spec: LayerSpec
  config: TransformerConfig

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], context: Context, cache: PyTree = None):
    self._check_places()
    if self.spec.mixer is not None:
      mixer = self.spec.mixer.copy(name="mixer")
      x, cache = self._residual("mixer", x, context, lambda y: mixer(y, context, cache))
    if self.spec.cross is not None:
      cross = self.spec.cross.copy(name="cross")
      x, _ = self._residual("cross", x, context, lambda y: cross(y, context, None))
    if self.spec.ffn is not None:
      ffn = self.spec.ffn.copy(name="ffn")
      x, _ = self._residual("ffn", x, context, lambda y: (ffn(y, context), None))
    return x, cache

  def _check_places(self) -> None:
    """Raises ValueError for parameters of a place that is left out, which nothing would read."""
    held = self.variables.get("params", {})
    if unread := [place for place in PLACES if place in held and place not in self.spec.modules]:
      raise ValueError(
        f"params: {'/'.join(self.path)} has {', '.join(unread)}, which {self.spec} does not read; "
        "allowed: the configuration that belongs to them, as adapters.add gives both"
      )

  def _residual(self, name: str, x, context: Context, function):
    norm = lambda suffix: self.config.norm.copy(name=name + suffix)
    post = self.config.arrangement == "post"
    y, state = function(x if post else norm("_norm")(x))
    if self.config.arrangement == "sandwich":
      y = norm("_post_norm")(y)
    after = self.spec.modules.get(f"after_{name}")
    if after is not None:
      y = after.copy(name=f"after_{name}")(y, context)
    return norm("_norm")(x + y) if post else x + y, state


class Pattern(nn.Module):
  """The layers of one repetition of a segment."""

  layers: tuple[LayerSpec, ...]
  config: TransformerConfig

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], context: Context, cache: PyTree = None):
    caches = []
    for i, spec in enumerate(self.layers):
      layer = Layer(spec, self.config, name=f"layers_{i}")
      x, new = layer(x, context, None if cache is None else cache[i])
      caches.append(new)
    return x, None if cache is None else tuple(caches)


@struct.dataclass
class Cache:
  """The caches of a model's layers, and where its rows go on.

  Attributes:
    layers: what the mixers keep.
    ends: [B], the position that follows each row's last token.
    length: how many positions there is room for.
  """

  layers: PyTree
  ends: Int[Array, "B"]
  length: int = struct.field(pytree_node=False)

  def write(self, layers: PyTree, slots: Int[Array, "B T"]) -> "Cache":
    """The cache after tokens in `slots`, of which those from `length` on were not written."""
    last = jnp.where(slots < self.length, slots + 1, 0).max(1, initial=0)
    return Cache(layers, jnp.where(last > 0, last, self.ends), self.length)


class Transformer(nn.Module):
  """A stack of layers between token embeddings and, with `config.head`, logits.

  Whether it is a decoder or an encoder is the affair of the masks in `config.layers`.

  Attributes:
    config: its shape.
    dtype: type of activations; parameters keep theirs and are cast where they are used.
    remat: whether the backward pass recomputes each repetition of a segment.
  """

  config: TransformerConfig
  dtype: DTypeLike = jnp.float32
  remat: bool = False

  @on_any_mesh
  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    cache: Cache | None = None,
    memory: Float[Array, "B S D"] | None = None,
    memory_segment_ids: Int[Array, "B S"] | None = None,
    global_positions: Int[Array, "B G"] | None = None,
    attributes: Int[Array, "B A"] | None = None,
    previous: Int[Array, "B T"] | None = None,
    predicted: Int[Array, "B T"] | None = None,
  ):
    """Logits [B, T, V], or hidden states [B, T, D]; with a `cache`, (those, the new cache).

    At padding they are zero, and cotangents that come back there have no influence: any of hidden
    states, of logits those that are finite, since another pass over all logits is not for free.

    Args:
      tokens: token ids; what padding holds has no influence, an id out of the vocabulary included;
        elsewhere a traced one gives NaN, and so does a traced position past a learned table.
      segment_ids: packed sequences: equal ids attend to one another, negative is padding. With a
        cache each row is one sequence, and a negative id a token that is not there.
      positions: None means 0 … T−1, and with a cache that each row goes on where it ended. Going on
        from an earlier position forgets what the row held from there on.
      cache: what `init_cache` gives or an earlier call returned.
      memory: what cross-attention reads.
      memory_segment_ids: as `segment_ids`, for `memory`.
      global_positions: tokens that mixers with global attention let see all, negative for none.
      attributes: ids of what each row is, for layers that choose by them.
      previous: the id before each token, for layers that read it; None means `tokens` shifted by
        one, so steps with a cache have to give it.
      predicted: the id that another model expects after each token, for layers that read it.

    Raises:
      ValueError: when T exceeds `config.context`, for facts of another shape than `tokens`, for
        ids out of range where they are known, for a `previous` that is missing, and for a position
        that the cache lacks. Where it is not known while tracing, its keys and values are not kept,
        and layers that keep them give NaN there.
    """
    config = self.config
    if more(tokens.shape[1], config.context):
      raise ValueError(f"tokens: length {tokens.shape[1]}; allowed: up to {config.context}")
    context = Context(
      tokens=tokens,
      positions=positions,
      segment_ids=segment_ids,
      memory=memory,
      memory_segment_ids=memory_segment_ids,
      global_positions=global_positions,
      attributes=attributes,
      previous=previous,
      predicted=predicted,
    )
    context.check()
    check_attributes(config, attributes)
    context = context.blanked()
    if cache is not None:
      if previous is None and "previous" in self.reads:
        allowed = "the id before each token, −1 before the first, since some layer reads it"
        raise ValueError(f"previous=None with a cache; allowed: {allowed}")
      context = context.after(tokens, cache.ends)
      slots = context.slots_for(tokens, cache.length)
    embed = Embed(config.vocab_size, config.embed_width or config.width, name="embed")
    x = self._embed(embed, context)
    caches = []
    for i, segment in enumerate(segments(config)):
      layers = self._segment(segment, cache is not None)(name=f"segments_{i}")
      x, new = layers(x, context, None if cache is None else cache.layers[i])
      caches.append(new)
    if config.final_norm:
      x = config.norm.copy(name="final_norm")(x)
    x = context.blank(x)
    x = x if config.head is None else self._logits(embed, x)
    return x if cache is None else (x, cache.write(tuple(caches), slots))

  @property
  def reads(self) -> set[str]:
    """The fields of `Context` that some layer reads."""
    return facts(self.config)

  def _segment(self, segment: Segment, cached: bool):
    body = nn.remat(Pattern, prevent_cse=segment.repeats == 1) if self.remat else Pattern
    if segment.repeats > 1:
      body = nn.scan(
        body,
        variable_axes=dict.fromkeys(("params", "losses", "metrics", "statistics", "taps"), 0),
        split_rngs=dict.fromkeys(RNG_STREAMS, True),
        in_axes=(nn.broadcast, 0 if cached else nn.broadcast),
        out_axes=0,
        length=segment.repeats,
      )
    return lambda name: body(segment.pattern, self.config, name=name)

  def _embed(self, embed: Embed, context: Context):
    config, tokens = self.config, context.tokens
    assert tokens is not None  # `__call__` has them
    x = context.blank(embed(tokens, self.dtype)) * jnp.asarray(config.embed_scale, self.dtype)
    if config.embed_width is not None:
      x = Linear(config.width, name="embed_in")(x)
    positions = context.positions_for(x)
    if config.positions == "learned":
      check_ids("positions", positions, config.context)
      entries = config.context + config.position_offset
      table = Embed(entries, config.width, name="positions")
      row = jnp.where(is_id(positions, config.context), positions + config.position_offset, -1)
      x = x + context.blank(table(row, self.dtype))
    if config.positions == "sinusoidal":
      positions = positions + config.position_offset
      x = x + sinusoidal_positions(positions, config.width).astype(self.dtype)
    if config.token_types:
      types = Embed(config.token_types, config.width, name="token_types")
      x = x + types(jnp.zeros_like(tokens), self.dtype)
    return config.norm.copy(name="embed_norm")(x) if config.embed_norm else x

  def _logits(self, embed: Embed, x):
    config = self.config
    if config.embed_width is not None:
      x = Linear(config.embed_width, name="embed_out")(x)
    logits = embed.logits(x) if config.tied else Linear(config.vocab_size, name="head")(x)
    return softcap(logits, config.logit_softcap)

  def init_cache(self, batch: int, length: int, *, dtype: DTypeLike | None = None) -> Cache:
    """Empty caches of all mixers for `batch` rows and `length` positions.

    Args:
      dtype: in which keys and values are kept; None means that of activations. With int8 there is
        a float32 scale for each token and head. What mixers keep in a type of their own, as
        recurrent states, stays in it.

    Raises:
      ValueError: when `length` exceeds `config.context`, a mixer has no caches, or none in `dtype`,
        or something in a layer looks at later tokens.
    """
    self.config.check_caches()
    for index, spec in enumerate(self.config.layers):
      for name in ("init_cache", "rewinds"):
        if spec.mixer is not None:
          ask(spec.mixer, name, f"layer {index}: mixer")
    if more(length, self.config.context):
      raise ValueError(f"length {length} of a cache; allowed: up to {self.config.context}")

    def of_layer(spec: LayerSpec):
      if spec.mixer is None:
        return None
      kept = self.dtype if dtype is None else dtype
      return spec.mixer.init_cache(self.config.width, batch, length, kept)

    def of_segment(segment: Segment):
      caches = tuple(of_layer(spec) for spec in segment.pattern)
      if segment.repeats == 1:
        return caches
      stack = lambda x: jnp.broadcast_to(x, (segment.repeats, *x.shape))
      return jax.tree.map(stack, caches)

    layers = tuple(of_segment(segment) for segment in segments(self.config))
    return Cache(layers, jnp.zeros(batch, jnp.int32), length)


class EncoderDecoder(nn.Module):
  """An encoder whose hidden states the decoder's cross-attention reads.

  Attributes:
    encoder: a configuration with `head=None`.
    decoder: a configuration whose layers have a `cross` module.
    dtype, remat: as in `Transformer`.
  """

  encoder: TransformerConfig
  decoder: TransformerConfig
  dtype: DTypeLike = jnp.float32
  remat: bool = False

  def setup(self):
    if all(spec.cross is None for spec in self.decoder.layers):
      raise ValueError("EncoderDecoder: no layer of `decoder` has a cross module")
    headless = dataclasses.replace(self.encoder, head=None)
    self.encode_stack = Transformer(headless, self.dtype, self.remat, name="encoder")
    self.decode_stack = Transformer(self.decoder, self.dtype, self.remat, name="decoder")

  def __call__(
    self,
    source: Int[Array, "B S"],
    tokens: Int[Array, "B T"],
    *,
    source_segment_ids: Int[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T V"]:
    """Logits of `tokens` given `source`; a negative segment id is padding."""
    memory = self.encode(source, segment_ids=source_segment_ids)
    return self.decode(
      tokens, memory, memory_segment_ids=source_segment_ids, segment_ids=segment_ids
    )

  def encode(self, source: Int[Array, "B S"], *, segment_ids=None) -> Float[Array, "B S D"]:
    """Hidden states of the encoder."""
    return self.encode_stack(source, segment_ids=segment_ids)

  def decode(self, tokens: Int[Array, "B T"], memory: Float[Array, "B S D"], **arguments):
    """What the decoder's `Transformer` gives for `memory`."""
    return self.decode_stack(tokens, memory=memory, **arguments)
