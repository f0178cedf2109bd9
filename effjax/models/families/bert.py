"""BERT encoders, MiniLM among them (arXiv 1810.04805), and RoBERTa (arXiv 1907.11692).

Hidden states, no pooler, no MLM head. RoBERTa's first position is the one after `pad_token_id`.
"""

from typing import Any

from effjax.layers.spec import TransformerConfig
from effjax.models.families import encoders, reading
from effjax.models.families.fields import Fields, complete
from effjax.models.families.table import Entry, Family, layer_norm, linear

NAMES = {
  "width": "hidden_size",
  "hidden": "intermediate_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "act": "hidden_act",
}
DEFAULTS = {
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-12,
  "max_position_embeddings": 512,
  "type_vocab_size": 2,
}
ROBERTA_DEFAULTS = DEFAULTS | {"pad_token_id": 1}


@complete(DEFAULTS)
def to_config(fields: Fields) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "bert"."""
  return _read(fields, "bert", 0)


@complete(ROBERTA_DEFAULTS)
def roberta_config(fields: Fields) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "roberta"."""
  return _read(fields, "roberta", fields.integer("pad_token_id", least=0) + 1)


def _read(fields: Fields, family: str, offset: int) -> TransformerConfig:
  fields.need("is_decoder", False, None)
  fields.need("position_embedding_type", "absolute", None)
  fields.unused("tie_word_embeddings")  # of a head that is not loaded
  rows = fields.integer("max_position_embeddings", least=offset + 1)
  return encoders.read(
    fields,
    family,
    NAMES,
    fields.eps("layer_norm_eps"),
    context=rows - offset,
    position_offset=offset,
    token_types=fields.integer("type_vocab_size"),
  )


def from_config(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  return encoders.write(config, config.family or "bert", NAMES) | {
    "type_vocab_size": config.token_types,
    "layer_norm_eps": reading.eps(config),
    "position_embedding_type": "absolute",
  }


def from_roberta(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  return from_config(config) | {"pad_token_id": config.position_offset - 1}


LAYOUT: dict[str, Any] = {
  "layer": (
    *linear("mixer/query", "encoder.layer.{i}.attention.self.query"),
    *linear("mixer/key", "encoder.layer.{i}.attention.self.key"),
    *linear("mixer/value", "encoder.layer.{i}.attention.self.value"),
    *linear("mixer/out", "encoder.layer.{i}.attention.output.dense"),
    *layer_norm("mixer_norm", "encoder.layer.{i}.attention.output.LayerNorm"),
    *linear("ffn/up", "encoder.layer.{i}.intermediate.dense"),
    *linear("ffn/down", "encoder.layer.{i}.output.dense"),
    *layer_norm("ffn_norm", "encoder.layer.{i}.output.LayerNorm"),
  ),
  "rest": (
    Entry("embed/embedding", "embeddings.word_embeddings.weight"),
    Entry("positions/embedding", "embeddings.position_embeddings.weight"),
    Entry("token_types/embedding", "embeddings.token_type_embeddings.weight"),
    *layer_norm("embed_norm", "embeddings.LayerNorm"),
  ),
  "renamed": encoders.RENAMED,
}
UNUSED = (r"embeddings\.position_ids", r"pooler\.dense\.(weight|bias)")
FAMILY = Family(
  "bert",
  "BertModel",
  to_config,
  from_config,
  prefixes=("", "bert."),
  unprefixed=("cls.",),
  ignored=(*UNUSED, r"cls\.predictions\..*", r"cls\.seq_relationship\.(weight|bias)"),
  **LAYOUT,
)
ROBERTA = Family(
  "roberta",
  "RobertaModel",
  roberta_config,
  from_roberta,
  prefixes=("", "roberta."),
  ignored=(*UNUSED, r"lm_head\..*"),
  **LAYOUT,
)
