"""BERT encoders, MiniLM among them (arXiv 1810.04805): hidden states, no pooler, no MLM head."""

from collections.abc import Mapping
from typing import Any

from effjax.attention.masks import Full
from effjax.attention.multi_head import Attention
from effjax.layers import MLP, LayerNorm
from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.models.families import reading
from effjax.models.families.table import Entry, Family, layer_norm, linear


def to_config(config: Mapping[str, Any]) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "bert"."""
  get = lambda name: reading.field(config, name)
  reading.need(config, "is_decoder", False)
  reading.need(config, "position_embedding_type", "absolute", "absolute", None)
  attention = Attention(get("num_attention_heads"), mask=Full(), use_bias=True, out_bias=True)
  ffn = MLP(
    get("intermediate_size"), reading.activation(config, "hidden_act", "gelu"), use_bias=True
  )
  return TransformerConfig(
    vocab_size=get("vocab_size"),
    width=get("hidden_size"),
    layers=(LayerSpec(attention, ffn),) * get("num_hidden_layers"),
    norm=LayerNorm(config.get("layer_norm_eps", 1e-12)),
    arrangement="post",
    final_norm=False,
    positions="learned",
    context=config.get("max_position_embeddings", 512),
    head=None,
    embed_norm=True,
    token_types=config.get("type_vocab_size", 2),
    family="bert",
  )


def from_config(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  attention, ffn = reading.first_layer(config, "bert", Attention, MLP)
  return {
    "model_type": "bert",
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "intermediate_size": ffn.width,
    "num_hidden_layers": len(config.layers),
    "num_attention_heads": attention.heads,
    "hidden_act": reading.activation_name(ffn.activation),
    "max_position_embeddings": config.context,
    "type_vocab_size": config.token_types,
    "layer_norm_eps": getattr(config.norm, "eps", None),
    "position_embedding_type": "absolute",
  }


FAMILY = Family(
  name="bert",
  architecture="BertModel",
  to_config=to_config,
  from_config=from_config,
  layer=(
    *linear("mixer/query", "encoder.layer.{i}.attention.self.query"),
    *linear("mixer/key", "encoder.layer.{i}.attention.self.key"),
    *linear("mixer/value", "encoder.layer.{i}.attention.self.value"),
    *linear("mixer/out", "encoder.layer.{i}.attention.output.dense"),
    *layer_norm("mixer_norm", "encoder.layer.{i}.attention.output.LayerNorm"),
    *linear("ffn/up", "encoder.layer.{i}.intermediate.dense"),
    *linear("ffn/down", "encoder.layer.{i}.output.dense"),
    *layer_norm("ffn_norm", "encoder.layer.{i}.output.LayerNorm"),
  ),
  rest=(
    Entry("embed/embedding", "embeddings.word_embeddings.weight"),
    Entry("positions/embedding", "embeddings.position_embeddings.weight"),
    Entry("token_types/embedding", "embeddings.token_type_embeddings.weight"),
    *layer_norm("embed_norm", "embeddings.LayerNorm"),
  ),
  prefixes=("", "bert."),
  unprefixed=("cls.",),
  ignored=(
    r"embeddings\.position_ids",
    r"pooler\.dense\.(weight|bias)",
    r"cls\.predictions\..*",
    r"cls\.seq_relationship\.(weight|bias)",
  ),
)
