"""A pretrained model: its configuration, module, parameters and tokenizer."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import trees
from effjax.core.known import check_ids, more
from effjax.core.typing import Array, Params
from effjax.layers.embedding import known_ids
from effjax.layers.spec import TransformerConfig, check_attributes
from effjax.models.tokenizers import PretrainedTokenizer
from effjax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class TokenIds:
  """The ids that begin, end and fill sequences.

  Attributes:
    bos, pad: None where there is none.
    eos: all that end one; `decode.generate` takes them as its `eos_id`.
  """

  bos: int | None = None
  eos: tuple[int, ...] = ()
  pad: int | None = None

  @classmethod
  def of(cls, tokenizer: PretrainedTokenizer | None) -> "TokenIds":
    """Those of a tokenizer; none where there is no tokenizer."""
    if tokenizer is None:
      return cls()
    eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    return cls(tokenizer.bos_id, eos, tokenizer.pad_id)


@dataclasses.dataclass(frozen=True)
class Model:
  """What `load` returns and `save` takes.

  Attributes:
    config: shape of the model.
    module: `module.apply({"params": params}, tokens)` gives logits, or hidden states.
    params: the parameters.
    tokenizer: None when the model came without one.
    ids: the ids that begin, end and fill sequences; None takes those of the tokenizer.
  """

  config: TransformerConfig
  module: Transformer
  params: Params
  tokenizer: PretrainedTokenizer | None = None
  ids: TokenIds | None = None

  def __post_init__(self):
    if self.ids is None:
      object.__setattr__(self, "ids", TokenIds.of(self.tokenizer))

  def __repr__(self) -> str:
    return f"Model({self.config!r}, {trees.count(self.params):,} parameters)"

  def __call__(self, tokens: Array | np.ndarray, **arguments) -> Array:
    """Logits [B, T, V], or hidden states [B, T, D] of an encoder, of checked tokens [B, T].

    Raises:
      ValueError: as `check_tokens`, and for attributes that the model does not have.
    """
    check_tokens(self.config, tokens, arguments.get("segment_ids"), self.params)
    check_attributes(self.config, arguments.get("attributes"))
    return _apply(self.module, self.params, jnp.asarray(tokens), arguments)


@functools.partial(jax.jit, static_argnums=0)
def _apply(module: Transformer, params: Params, tokens: Array, arguments: dict) -> Array:
  output: Any = module.apply({"params": params}, tokens, **arguments)
  return output


def check_tokens(
  config: TransformerConfig,
  tokens: Array | np.ndarray,
  segment_ids: Array | np.ndarray | None = None,
  params: Params | None = None,
) -> None:
  """Refuses tokens that a model cannot take; under a trace, only their shape can be seen.

  Ids are those that the table of embeddings in `params` knows, virtual tokens included, or those of
  the vocabulary. Ids at padding, where a segment id is negative, may be any. A traced id that is
  out of range gives NaN.

  Raises:
    ValueError: for tokens that are no integers [B, T], ids out of range, or a sequence longer
      than `config.context`.

  Example:
    >>> from effjax.models import presets
    >>> check_tokens(presets.SMOLLM2_135M, np.array([[49152]]))
    Traceback (most recent call last):
    ValueError: tokens: id 49152 at [0, 0]; allowed: 0 to 49151
  """
  if len(tokens.shape) != 2 or not np.issubdtype(tokens.dtype, np.integer):
    raise ValueError(f"tokens: {tokens.dtype}{list(tokens.shape)}; allowed: integers [B, T]")
  if more(tokens.shape[1], config.context):
    raise ValueError(f"tokens: length {tokens.shape[1]}; allowed: up to {config.context}")
  real = None if segment_ids is None else segment_ids >= 0
  check_ids("tokens", tokens, known_ids(config.vocab_size, params or {}), real)
