"""Llama and its like, SmolLM2 among them (arXiv 2302.13971, 2502.02737)."""

from typing import Any

from effjax.layers.spec import TransformerConfig
from effjax.models.families import decoders
from effjax.models.families.fields import Fields, complete

DEFAULTS = decoders.DEFAULTS | {
  "max_position_embeddings": 2048,
  "tie_word_embeddings": False,
  "attention_bias": False,
  "mlp_bias": False,
}


@complete(DEFAULTS)
def to_config(fields: Fields) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "llama"."""
  fields.need("rope_interleaved", False, None)
  bias = fields.flag("attention_bias")
  return decoders.read(
    fields,
    "llama",
    decoders.uniform(fields),
    decoders.one_rope(fields),
    attention={"use_bias": bias, "out_bias": bias},
    mlp_bias=fields.flag("mlp_bias"),
  )


def from_config(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  fields = decoders.write(config, "llama")
  mixer, ffn = decoders.parts(config, "llama")
  return fields | {"attention_bias": mixer.use_bias, "mlp_bias": ffn.use_bias}


FAMILY = decoders.family("llama", "LlamaForCausalLM", to_config, from_config)
