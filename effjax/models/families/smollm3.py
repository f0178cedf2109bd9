"""SmolLM3: Llama whose every fourth layer has no rotary positions (arXiv 2501.18795)."""

from typing import Any

from effjax.layers.spec import TransformerConfig
from effjax.models.families import decoders
from effjax.models.families.decoders import LOCAL
from effjax.models.families.fields import Fields, complete

DEFAULTS = decoders.DEFAULTS | {
  "num_key_value_heads": 4,
  "rope_theta": 2e6,
  "max_position_embeddings": 32_768,
  "tie_word_embeddings": True,
  "attention_bias": False,
  "mlp_bias": False,
  "use_sliding_window": False,
  "sliding_window": None,
  "layer_types": None,
  "no_rope_layers": None,
  "no_rope_layer_interval": 4,
}


@complete(DEFAULTS)
def to_config(fields: Fields) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "smollm3"."""
  rotated, bias = _rotated(fields), fields.flag("attention_bias")
  window, used = fields.integer("sliding_window", null=True), fields.flag("use_sliding_window")
  windowed = used and window is not None
  kinds = decoders.layer_types(fields, lambda i: windowed and not rotated[i])
  if LOCAL in kinds and not windowed:
    raise fields.wrong("use_sliding_window", f"true, where layer_types has {LOCAL!r}")
  rope = decoders.one_rope(fields)
  return decoders.read(
    fields,
    "smollm3",
    kinds,
    lambda i: rope(i) if rotated[i] else None,
    attention={"use_bias": bias, "out_bias": bias},
    mlp_bias=fields.flag("mlp_bias"),
  )


def _rotated(fields: Fields) -> list[int]:
  count, interval = fields.depth("num_hidden_layers"), fields.integer("no_rope_layer_interval")
  fields.unused("max_window_layers")
  given = fields.items("no_rope_layers", (int,), count)
  return given or [int((i + 1) % interval != 0) for i in range(count)]


def from_config(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  mixer, ffn = decoders.parts(config, "smollm3")
  window = decoders.written_window(config)
  mixers: list[Any] = [spec.mixer for spec in config.layers]
  return decoders.write(config, "smollm3") | {
    "attention_bias": mixer.use_bias,
    "mlp_bias": ffn.use_bias,
    "use_sliding_window": window is not None,
    "sliding_window": window,
    "layer_types": decoders.written_types(config),
    "no_rope_layers": [int(m.rope is not None) for m in mixers],
  }


FAMILY = decoders.family("smollm3", "SmolLM3ForCausalLM", to_config, from_config)
