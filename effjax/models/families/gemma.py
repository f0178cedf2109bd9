"""Gemma 2 and 3, the text models (arXiv 2408.00118, 2503.19786): local layers, sandwich norms."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from effjax.attention.masks import Causal, SlidingWindow
from effjax.attention.multi_head import Attention
from effjax.layers import Rope
from effjax.layers.spec import TransformerConfig
from effjax.models.families import decoders, rope
from effjax.models.families.decoders import GLOBAL, LOCAL
from effjax.models.families.fields import MOST_LAYERS, Fields, complete
from effjax.models.families.harmless import CONFIG
from effjax.models.families.table import GATED_MLP, SELF_ATTENTION, Entry, linear

COMMON = {
  "hidden_size": 2304,
  "intermediate_size": 9216,
  "num_hidden_layers": 26,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh",
  "rms_norm_eps": 1e-6,
  "original_max_position_embeddings": None,
  "tie_word_embeddings": True,
  "attention_bias": False,
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
  "layer_types": None,
}
GEMMA2_DEFAULTS = COMMON | {
  "vocab_size": 256_000,
  "max_position_embeddings": 8192,
  "rope_theta": 1e4,
  "final_logit_softcapping": 30.0,
  "attn_logit_softcapping": 50.0,
}
GEMMA3_DEFAULTS = COMMON | {
  "vocab_size": 262_208,
  "max_position_embeddings": 131_072,
  "rope_theta": 1e6,
  "rope_local_base_freq": 1e4,
  "final_logit_softcapping": None,
  "attn_logit_softcapping": None,
  "sliding_window_pattern": 6,
}
# Fields about images, beside `text_config`.
OTHER_PARTS = {
  "vision_config",
  "mm_tokens_per_image",
  *(f"{what}_token_{kind}" for what in ("image", "boi", "eoi") for kind in ("index", "id")),
}


@complete(GEMMA2_DEFAULTS)
def gemma2_config(fields: Fields) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "gemma2"."""
  kinds = decoders.layer_types(fields, lambda i: i % 2 == 0)
  return _read(fields, "gemma2", kinds, decoders.one_rope(fields), {})


def gemma3_config(
  config: Mapping[str, Any], where: str = "config", layers: int = MOST_LAYERS
) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "gemma3_text", or "gemma3" around it."""
  outer = Fields(where, config)
  if "text_config" not in outer:
    return _gemma3_text(config, where, layers)
  text = outer.raw("text_config")
  Fields(f"{where}: text_config", text)
  if "tie_word_embeddings" in outer:
    text = {**text, "tie_word_embeddings": outer.raw("tie_word_embeddings")}
  outer.finish(CONFIG | OTHER_PARTS)
  return _gemma3_text(text, f"{where}: text_config", layers)


@complete(GEMMA3_DEFAULTS)
def _gemma3_text(fields: Fields) -> TransformerConfig:
  period = fields.integer("sliding_window_pattern")
  if "layer_types" not in fields:
    fields.need("_sliding_window_pattern", None, period)
  fields.unused("_sliding_window_pattern")
  kinds = decoders.layer_types(fields, lambda i: (i + 1) % period != 0)
  ropes = _two_ropes(fields)
  qk_norm = {"qk_norm": fields.eps("rms_norm_eps")}
  return _read(fields, "gemma3", kinds, lambda i: ropes[kinds[i]], qk_norm)


def _read(
  fields: Fields,
  family: str,
  kinds: list[str],
  ropes: Callable[[int], Rope | None],
  attention: Mapping[str, Any],
) -> TransformerConfig:
  fields.need("use_bidirectional_attention", False, None)
  fields.need("hidden_act", None, fields.raw("hidden_activation"))
  bias, cap = fields.flag("attention_bias"), _cap(fields, "attn")
  scale = fields.number("query_pre_attn_scalar") ** -0.5
  biases = {"use_bias": bias, "out_bias": bias}
  return decoders.read(
    fields,
    family,
    kinds,
    ropes,
    attention={"scale": scale, "logit_softcap": cap, **biases, **attention},
    act="hidden_activation",
    arrangement="sandwich",
    embed_scale=math.sqrt(fields.integer("hidden_size")),
    logit_softcap=_cap(fields, "final"),
  )


def _cap(fields: Fields, what: str) -> float | None:
  return fields.number(f"{what}_logit_softcapping", null=True, whole=False)


def _two_ropes(fields: Fields) -> dict[str, Rope]:
  """Rotary positions by kind of layer: `rope_scaling` is of the global ones, as transformers."""
  context = fields.integer("max_position_embeddings")
  both, scaling = fields.inner("rope_parameters"), fields.inner("rope_scaling", rope.DEFAULTS)
  local, whole = (both.inner(kind, rope.DEFAULTS) for kind in (LOCAL, GLOBAL))
  both.finish()
  options = {"context": context, "original": fields.raw("original_max_position_embeddings")}
  return {
    LOCAL: rope.read(local, theta=fields.number("rope_local_base_freq"), **options),
    GLOBAL: rope.read(whole.updated(scaling), theta=fields.number("rope_theta"), **options),
  }


def from_gemma2(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  return _written(config, "gemma2") | {"model_type": "gemma2"}


def from_gemma3(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  local = decoders.first_rope(config, SlidingWindow)
  whole = decoders.first_rope(config, Causal)
  if local is not None and (local.scaling, local.factor) != (None, 1.0):
    raise ValueError(f"rope={local} of a local layer; allowed: no scaling in family 'gemma3'")
  positions = rope.write(whole) if whole else {"rope_theta": 1e6, "rope_scaling": None}
  positions |= {"rope_local_base_freq": local.theta if local else 1e4}
  return _written(config, "gemma3") | positions | {"model_type": "gemma3_text"}


def _written(config: TransformerConfig, family: str) -> dict[str, Any]:
  attention, _ = decoders.parts(config, family)
  return decoders.write(config, family, act="hidden_activation") | {
    "query_pre_attn_scalar": _pre_attention_scalar(attention, config.width),
    "sliding_window": decoders.written_window(config) or 4096,
    "layer_types": decoders.written_types(config),
    "attention_bias": attention.use_bias,
    "attn_logit_softcapping": attention.logit_softcap,
    "final_logit_softcapping": config.logit_softcap,
  }


def _pre_attention_scalar(attention: Attention, width: int) -> int | float:
  if attention.scale is None:
    return attention.head_width or width // attention.heads
  scalar = attention.scale**-2
  return round(scalar) if math.isclose(scalar, round(scalar), rel_tol=1e-9) else scalar


def _norm(path: str, name: str) -> Entry:
  return Entry(f"{path}/scale", f"{name}.weight", shift=1.0)


LAYER = (
  _norm("mixer_norm", "layers.{i}.input_layernorm"),
  *SELF_ATTENTION,
  _norm("mixer_post_norm", "layers.{i}.post_attention_layernorm"),
  _norm("ffn_norm", "layers.{i}.pre_feedforward_layernorm"),
  *GATED_MLP,
  _norm("ffn_post_norm", "layers.{i}.post_feedforward_layernorm"),
)
HEAD_NORMS = (
  _norm("mixer/query_norm", "layers.{i}.self_attn.q_norm"),
  _norm("mixer/key_norm", "layers.{i}.self_attn.k_norm"),
)
REST = (
  Entry("embed/embedding", "embed_tokens.weight"),
  _norm("final_norm", "norm"),
  *linear("head", "lm_head", bias=False),
)
GEMMA2 = decoders.family(
  "gemma2", "Gemma2ForCausalLM", gemma2_config, from_gemma2, layer=LAYER, rest=REST
)
GEMMA3 = decoders.family(
  "gemma3",
  "Gemma3ForCausalLM",
  gemma3_config,
  from_gemma3,
  layer=(*LAYER, *HEAD_NORMS),
  rest=REST,
  prefixes=("model.", "language_model.model.", "model.language_model.", ""),
  ignored=(r"(model\.)?vision_tower\..*", r"(model\.)?multi_modal_projector\..*"),
)
