"""Mistral 7B (arXiv 2310.06825): Llama whose layers all see a window, where one is given."""

from typing import Any

from effjax.layers.spec import TransformerConfig
from effjax.models.families import decoders
from effjax.models.families.fields import Fields, complete

DEFAULTS = decoders.DEFAULTS | {
  "num_key_value_heads": 8,
  "max_position_embeddings": 131_072,
  "tie_word_embeddings": False,
  "sliding_window": 4096,
}


@complete(DEFAULTS)
def to_config(fields: Fields) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "mistral"."""
  windowed = fields.integer("sliding_window", null=True) is not None
  return decoders.read(
    fields,
    "mistral",
    decoders.uniform(fields, decoders.LOCAL if windowed else decoders.GLOBAL),
    decoders.one_rope(fields),
    attention={},
  )


def from_config(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  fields = decoders.write(config, "mistral")
  return fields | {"sliding_window": decoders.written_window(config)}


FAMILY = decoders.family("mistral", "MistralForCausalLM", to_config, from_config)
