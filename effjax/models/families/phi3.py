"""Phi-3 (arXiv 2404.14219): Llama with one tensor for query, key and value, one for gate and up."""

from typing import Any

from effjax.layers.spec import TransformerConfig
from effjax.models.families import decoders, rope
from effjax.models.families.fields import Fields, complete
from effjax.models.families.table import Entry, linear

DEFAULTS = decoders.DEFAULTS | {
  "max_position_embeddings": 4096,
  "original_max_position_embeddings": 4096,
  "rms_norm_eps": 1e-5,
  "tie_word_embeddings": False,
  "partial_rotary_factor": 1.0,
  "sliding_window": None,
}


@complete(DEFAULTS)
def to_config(fields: Fields) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "phi3"."""
  for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
    fields.need(name, False, None)
  for name in ("full_attn_mod", "interpolate_factor"):
    fields.need(name, 1, None)
  windowed = fields.integer("sliding_window", null=True) is not None
  return decoders.read(
    fields,
    "phi3",
    decoders.uniform(fields, decoders.LOCAL if windowed else decoders.GLOBAL),
    decoders.one_rope(
      fields, fraction=fields.number("partial_rotary_factor"), kinds=rope.PHI3_KINDS
    ),
    attention={},
  )


def from_config(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  rotary = decoders.first_rope(config)
  original = getattr(getattr(rotary, "scaling", None), "context", config.context)
  return decoders.write(config, "phi3") | {
    "sliding_window": decoders.written_window(config),
    "partial_rotary_factor": getattr(rotary, "fraction", 1.0),
    "original_max_position_embeddings": original,
  }


def _together(name: str, *paths: str) -> tuple[Entry, ...]:
  kernels = tuple(f"{path}/kernel" for path in paths)
  return tuple(Entry(path, f"{name}.weight", transpose=True, together=kernels) for path in kernels)


FAMILY = decoders.family(
  "phi3",
  "Phi3ForCausalLM",
  to_config,
  from_config,
  layer=(
    Entry("mixer_norm/scale", "layers.{i}.input_layernorm.weight"),
    *_together("layers.{i}.self_attn.qkv_proj", "mixer/query", "mixer/key", "mixer/value"),
    *linear("mixer/out", "layers.{i}.self_attn.o_proj", bias=False),
    Entry("ffn_norm/scale", "layers.{i}.post_attention_layernorm.weight"),
    *_together("layers.{i}.mlp.gate_up_proj", "ffn/gate", "ffn/up"),
    *linear("ffn/down", "layers.{i}.mlp.down_proj", bias=False),
  ),
)
