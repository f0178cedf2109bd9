"""What BERT, RoBERTa and DistilBERT share: post-norm encoders without a head, embeddings normed."""

from collections.abc import Mapping
from typing import Any

from effjax.attention.masks import Full
from effjax.attention.multi_head import Attention
from effjax.layers import MLP, LayerNorm
from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.models.families import reading
from effjax.models.families.fields import Fields

# TensorFlow's names, which old files kept.
RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def read(
  fields: Fields, family: str, names: Mapping[str, str], eps: float, **others: Any
) -> TransformerConfig:
  """The configuration; `names` are those of "width", "hidden", "layers", "heads" and "act"."""
  reading.width(fields, names["width"], names["heads"])
  attention = Attention(fields.integer(names["heads"]), mask=Full(), use_bias=True, out_bias=True)
  act = reading.activation(fields, names["act"])
  ffn = MLP(fields.integer(names["hidden"]), act, use_bias=True)
  return TransformerConfig(
    vocab_size=fields.integer("vocab_size"),
    width=fields.integer(names["width"]),
    layers=(LayerSpec(attention, ffn),) * fields.depth(names["layers"]),
    norm=LayerNorm(eps),
    arrangement="post",
    final_norm=False,
    positions="learned",
    head=None,
    embed_norm=True,
    family=family,
    **others,
  )


def write(config: TransformerConfig, family: str, names: Mapping[str, str]) -> dict[str, Any]:
  """The fields that all have."""
  attention, ffn = reading.first_layer(config, family, Attention, MLP)
  return {
    "model_type": family,
    "vocab_size": config.vocab_size,
    names["width"]: config.width,
    names["hidden"]: ffn.width,
    names["layers"]: len(config.layers),
    names["heads"]: attention.heads,
    names["act"]: reading.activation_name(ffn.activation),
    "max_position_embeddings": config.context + config.position_offset,
  }
