"""DistilBERT (arXiv 1910.01108): BERT without token types, under names of its own."""

from typing import Any

from effjax.layers.spec import TransformerConfig
from effjax.models.families import encoders
from effjax.models.families.fields import Fields, complete
from effjax.models.families.table import Entry, Family, layer_norm, linear

NAMES = {
  "width": "dim",
  "hidden": "hidden_dim",
  "layers": "n_layers",
  "heads": "n_heads",
  "act": "activation",
}
DEFAULTS = {
  "activation": "gelu",
  "max_position_embeddings": 512,
}
ALIASES = {
  "hidden_size": "dim",
  "num_hidden_layers": "n_layers",
  "num_attention_heads": "n_heads",
}
EPS = 1e-12  # whatever a file says


@complete(DEFAULTS, ALIASES)
def to_config(fields: Fields) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "distilbert"."""
  # What the table of positions began as, and a head that is not loaded.
  fields.unused("sinusoidal_pos_embds", "tie_word_embeddings", "tie_weights_")
  context = fields.integer("max_position_embeddings")
  return encoders.read(fields, "distilbert", NAMES, EPS, context=context)


def from_config(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  return encoders.write(config, "distilbert", NAMES)


FAMILY = Family(
  name="distilbert",
  architecture="DistilBertModel",
  to_config=to_config,
  from_config=from_config,
  layer=(
    *linear("mixer/query", "transformer.layer.{i}.attention.q_lin"),
    *linear("mixer/key", "transformer.layer.{i}.attention.k_lin"),
    *linear("mixer/value", "transformer.layer.{i}.attention.v_lin"),
    *linear("mixer/out", "transformer.layer.{i}.attention.out_lin"),
    *layer_norm("mixer_norm", "transformer.layer.{i}.sa_layer_norm"),
    *linear("ffn/up", "transformer.layer.{i}.ffn.lin1"),
    *linear("ffn/down", "transformer.layer.{i}.ffn.lin2"),
    *layer_norm("ffn_norm", "transformer.layer.{i}.output_layer_norm"),
  ),
  rest=(
    Entry("embed/embedding", "embeddings.word_embeddings.weight"),
    Entry("positions/embedding", "embeddings.position_embeddings.weight"),
    *layer_norm("embed_norm", "embeddings.LayerNorm"),
  ),
  prefixes=("", "distilbert."),
  unprefixed=("vocab_",),
  ignored=(
    r"embeddings\.position_ids",
    r"vocab_(transform|layer_norm)\.(weight|bias)",
    r"vocab_projector\.(weight|bias)",
  ),
  renamed=encoders.RENAMED,
)
