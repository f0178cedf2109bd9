"""A model as a list of layer specifications.

Jamba is a pattern of mixers, "MoE every second layer" a pattern of feed-forward layers, Gemma's
five local to one global a pattern of masks: `layers` says it in the open.
"""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import flax.linen as nn
import jax.numpy as jnp

from effjax.core.typing import Array, DTypeLike, Float, PyTree
from effjax.layers.context import Context
from effjax.layers.norms import RMSNorm


@runtime_checkable
class Mixer(Protocol):
  """What mixes positions: a module for the places `mixer` and `cross` of a layer.

  Attributes:
    rewinds: whether a cache forgets the newest tokens by going on from an earlier position, as
      keys and values that lie by position do, and a recurrent state does not.
  """

  rewinds: ClassVar[bool]

  def __call__(
    self, x: Float[Array, "B T D"], context: Context = Context(), cache: PyTree = None
  ) -> tuple[Float[Array, "B T D"], PyTree]:
    """y, and the cache after x: it has absorbed each token once, those that are not there never.

    Whether a token is there, `context.segment_ids` says; see `Context`.
    """
    ...

  def init_cache(
    self, width: int, batch: int, length: int, dtype: DTypeLike = jnp.float32
  ) -> PyTree:
    """The cache of a model of `width` before the first of `length` tokens.

    Raises:
      ValueError: when this mixer cannot go on from a cache.
    """
    ...

  def flops(self, width: int, length: int) -> float:
    """FLOPs of matrix products a token, forward, in a sequence of `length`."""
    ...


@runtime_checkable
class FeedForward(Protocol):
  """What acts on each position: a module for the place `ffn` of a layer.

  One whose tokens use a part of its parameters each says how many, `active(params) -> int`.
  """

  def __call__(
    self, x: Float[Array, "B T D"], context: Context = Context()
  ) -> Float[Array, "B T D"]:
    """y, finite at padding too."""
    ...

  def flops(self, width: int, length: int) -> float:
    """FLOPs of matrix products a token, forward, in a sequence of `length`."""
    ...


@dataclasses.dataclass(frozen=True)
class LayerSpec:
  """One layer: modules for its places; None leaves a place out.

  Attributes:
    mixer: mixes positions, a `Mixer`.
    ffn: acts on each position, a `FeedForward`.
    cross: attends to another sequence, between the two; a `Mixer` that is given no cache.
  """

  mixer: nn.Module | None
  ffn: nn.Module | None
  cross: nn.Module | None = None


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """The shape of a model.

  Attributes:
    vocab_size: entries V of the token table.
    width: model width D.
    layers: one `LayerSpec` per layer.
    norm: the normalisation, an unbound module.
    arrangement: where it stands: "pre" x + f(norm(x)), "post" norm(x + f(x)), or "sandwich"
      x + norm(f(norm(x))).
    final_norm: whether a norm follows the last layer.
    positions: "learned" or "sinusoidal" vectors added to the embeddings; None adds none.
    context: the longest sequence.
    position_offset: rows of the learned table before position 0 (2 in OPT).
    head: "lm" gives logits [B, T, V], None hidden states [B, T, D].
    tied: whether the head is the transposed token table.
    embed_width: width of the token table where it differs from D; projections join the two.
    embed_scale: factor of the embeddings (√D in Gemma).
    embed_norm: whether a norm follows the embeddings (BERT).
    token_types: rows of a token-type table, type 0 throughout (BERT); 0 for none.
    logit_softcap: caps the logits, see `numerics.softcap`.
    scan: equal neighbours share one compiled body and stacked parameters.
    family: which published layout the parameters save to, e.g. "llama"; None for none.
  """

  vocab_size: int
  width: int
  layers: tuple[LayerSpec, ...]
  norm: nn.Module = RMSNorm()
  arrangement: str = "pre"
  final_norm: bool = True
  positions: str | None = None
  context: int = 2048
  position_offset: int = 0
  head: str | None = "lm"
  tied: bool = True
  embed_width: int | None = None
  embed_scale: float = 1.0
  embed_norm: bool = False
  token_types: int = 0
  logit_softcap: float | None = None
  scan: bool = True
  family: str | None = None

  def __post_init__(self):
    positive = ("vocab_size", "width", "context")
    for name in positive:
      if getattr(self, name) < 1:
        raise ValueError(f"TransformerConfig: {name}={getattr(self, name)}; allowed: from 1")
    _check("arrangement", self.arrangement, ("pre", "post", "sandwich"))
    _check("positions", self.positions, (None, "learned", "sinusoidal"))
    _check("head", self.head, (None, "lm"))
    object.__setattr__(self, "layers", tuple(self.layers))


_MIXER = "a Mixer: (x, context, cache) -> (y, cache), with init_cache, flops and rewinds"
_FEED_FORWARD = "a FeedForward: (x, context) -> y, with flops"
_PROTOCOLS = {"mixer": _MIXER, "cross": _MIXER, "ffn": _FEED_FORWARD}


def require(config: TransformerConfig, place: str, *names: str) -> None:
  """Raises ValueError, naming layer and module, unless all modules at `place` have all of `names`.

  Args:
    config: the model.
    place: "mixer", "cross" or "ffn".
    names: of attributes and methods.
  """
  for index, spec in enumerate(config.layers):
    module = getattr(spec, place)
    missing = [name for name in names if module is not None and not hasattr(module, name)]
    if missing:
      raise ValueError(
        f"layer {index}: {place} {type(module).__name__} has no {' and no '.join(missing)}; "
        f"allowed: {_PROTOCOLS[place]}"
      )


def _check(name: str, value, allowed: tuple) -> None:
  if value not in allowed:
    raise ValueError(f"TransformerConfig: {name}={value!r}; allowed: {allowed}")
