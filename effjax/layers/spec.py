"""A model as a list of layer specifications.

Jamba is a pattern of mixers, "MoE every second layer" a pattern of feed-forward layers, Gemma's
five local to one global a pattern of masks: `layers` says it in the open.
"""

import dataclasses

import flax.linen as nn

from effjax.layers.norms import RMSNorm


@dataclasses.dataclass(frozen=True)
class LayerSpec:
  """One layer: modules for its places; None leaves a place out.

  Attributes:
    mixer: mixes positions, `module(x, context, cache) -> (y, cache)`.
    ffn: acts on each position, `module(x, context) -> y`.
    cross: attends to another sequence, between the two; same protocol as `mixer`.
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


def _check(name: str, value, allowed: tuple) -> None:
  if value not in allowed:
    raise ValueError(f"TransformerConfig: {name}={value!r}; allowed: {allowed}")
