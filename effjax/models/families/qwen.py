"""Qwen2 and Qwen3 (arXiv 2407.10671, 2505.09388): biases of the projections, or normed heads."""

from collections.abc import Mapping
from typing import Any

from effjax.layers.spec import TransformerConfig
from effjax.models.families import decoders
from effjax.models.families.decoders import LOCAL
from effjax.models.families.fields import Fields, complete
from effjax.models.families.table import HEAD_NORMS

QWEN2_DEFAULTS = decoders.DEFAULTS | {
  "num_key_value_heads": 32,
  "max_position_embeddings": 32_768,
  "tie_word_embeddings": False,
  "use_sliding_window": False,
  "sliding_window": 4096,
  "max_window_layers": 28,
  "layer_types": None,
}
QWEN3_DEFAULTS = QWEN2_DEFAULTS | {"head_dim": 128, "attention_bias": False}


@complete(QWEN2_DEFAULTS)
def qwen2_config(fields: Fields) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "qwen2"."""
  return _read(fields, "qwen2", {"use_bias": True})


@complete(QWEN3_DEFAULTS)
def qwen3_config(fields: Fields) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "qwen3"."""
  bias, eps = fields.flag("attention_bias"), fields.eps("rms_norm_eps")
  return _read(fields, "qwen3", {"use_bias": bias, "out_bias": bias, "qk_norm": eps})


def _read(fields: Fields, family: str, attention: Mapping[str, Any]) -> TransformerConfig:
  fields.need("use_mrope", False, None)
  window, used = fields.integer("sliding_window", null=True), fields.flag("use_sliding_window")
  windowed = used and window is not None
  first = fields.integer("max_window_layers", least=0)
  kinds = decoders.layer_types(fields, lambda i: windowed and i >= first)
  if LOCAL in kinds and not windowed:
    raise fields.wrong("use_sliding_window", f"true, where layer_types has {LOCAL!r}")
  return decoders.read(fields, family, kinds, decoders.one_rope(fields), attention=attention)


def _written(config: TransformerConfig, family: str) -> dict[str, Any]:
  window = decoders.written_window(config)
  return decoders.write(config, family) | {
    "use_sliding_window": window is not None,
    "sliding_window": window,
    "max_window_layers": len(config.layers),
    "layer_types": decoders.written_types(config),
  }


def from_qwen2(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  return _written(config, "qwen2")


def from_qwen3(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  return _written(config, "qwen3") | {"attention_bias": decoders.parts(config, "qwen3")[0].use_bias}


QWEN2 = decoders.family("qwen2", "Qwen2ForCausalLM", qwen2_config, from_qwen2)
QWEN3 = decoders.family(
  "qwen3", "Qwen3ForCausalLM", qwen3_config, from_qwen3, layer=(*decoders.LAYER, *HEAD_NORMS)
)
