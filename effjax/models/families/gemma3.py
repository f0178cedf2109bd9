"""Gemma 3, the text model (arXiv 2503.19786): five local layers to one global, sandwich norms."""

import math
from collections.abc import Mapping
from typing import Any

from effjax.attention.masks import Causal, SlidingWindow
from effjax.attention.multi_head import Attention
from effjax.layers import MLP, RMSNorm
from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.models.families import reading
from effjax.models.families.table import GATED_MLP, SELF_ATTENTION, Entry, Family, linear

LOCAL, GLOBAL = "sliding_attention", "full_attention"


def to_config(config: Mapping[str, Any]) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "gemma3_text" or "gemma3"."""
  config = config.get("text_config") or config
  get = lambda name: reading.field(config, name)
  reading.need(config, "use_bidirectional_attention", False, False, None)
  width, context = get("hidden_size"), config.get("max_position_embeddings", 131_072)
  kinds = _kinds(config)
  spec = {kind: LayerSpec(_attention(config, kind), _ffn(config)) for kind in set(kinds)}
  return TransformerConfig(
    vocab_size=get("vocab_size"),
    width=width,
    layers=tuple(spec[kind] for kind in kinds),
    norm=RMSNorm(config.get("rms_norm_eps", 1e-6)),
    arrangement="sandwich",
    context=context,
    tied=config.get("tie_word_embeddings", True),
    embed_scale=math.sqrt(width),
    logit_softcap=config.get("final_logit_softcapping"),
    family="gemma3",
  )


def _kinds(config: Mapping[str, Any]) -> list[str]:
  period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
  layers = range(reading.field(config, "num_hidden_layers"))
  kinds = config.get("layer_types") or [GLOBAL if (i + 1) % period == 0 else LOCAL for i in layers]
  strange = set(kinds) - {LOCAL, GLOBAL}
  if strange or len(kinds) != len(layers):
    raise ValueError(
      f"config: layer_types={kinds}; allowed: {len(layers)} of {LOCAL!r}, {GLOBAL!r}"
    )
  return kinds


def _attention(config: Mapping[str, Any], kind: str) -> Attention:
  window = config.get("sliding_window", 4096)
  width, bias = config.get("head_dim", 256), config.get("attention_bias", False)
  return Attention(
    heads=reading.field(config, "num_attention_heads"),
    kv_heads=reading.field(config, "num_key_value_heads"),
    head_width=width,
    # A window of w keys counts the query's own.
    mask=SlidingWindow(window - 1, 0) if kind == LOCAL else Causal(),
    rope=_rope(config, kind),
    use_bias=bias,
    out_bias=bias,
    qk_norm=config.get("rms_norm_eps", 1e-6),
    scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
    logit_softcap=config.get("attn_logit_softcapping"),
  )


def _rope(config: Mapping[str, Any], kind: str):
  if "rope_parameters" in config:
    return reading.rope(config["rope_parameters"][kind], 1e6 if kind == GLOBAL else 1e4)
  if kind == LOCAL:
    return reading.rope(None, config.get("rope_local_base_freq", 1e4))
  return reading.rope(config.get("rope_scaling"), config.get("rope_theta", 1e6))


def _ffn(config: Mapping[str, Any]) -> MLP:
  act = reading.activation(config, "hidden_activation", "gelu_pytorch_tanh")
  return MLP(reading.field(config, "intermediate_size"), act, gated=True)


def from_config(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  attention, ffn = reading.first_layer(config, "gemma3", Attention, MLP)
  mixers: list[Any] = [spec.mixer for spec in config.layers]
  local = next((m for m in mixers if isinstance(m.mask, SlidingWindow)), None)
  whole = next((m for m in mixers if isinstance(m.mask, Causal)), None)
  local_rope, rope = getattr(local, "rope", None), getattr(whole, "rope", None)
  return {
    "model_type": "gemma3_text",
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "intermediate_size": ffn.width,
    "num_hidden_layers": len(config.layers),
    "num_attention_heads": attention.heads,
    "num_key_value_heads": attention.kv_heads or attention.heads,
    "head_dim": attention.head_width or config.width // attention.heads,
    "hidden_activation": reading.activation_name(ffn.activation),
    "max_position_embeddings": config.context,
    "rms_norm_eps": getattr(config.norm, "eps", None),
    "query_pre_attn_scalar": _pre_attention_scalar(attention, config.width),
    "sliding_window": local.mask.left + 1 if local else 4096,
    "layer_types": [LOCAL if isinstance(m.mask, SlidingWindow) else GLOBAL for m in mixers],
    "rope_local_base_freq": local_rope.theta if local_rope else 1e4,
    "rope_theta": rope.theta if rope else 1e6,
    "rope_scaling": reading.rope_scaling(rope) if rope else None,
    "attention_bias": attention.use_bias,
    "attn_logit_softcapping": attention.logit_softcap,
    "final_logit_softcapping": config.logit_softcap,
    "tie_word_embeddings": config.tied,
  }


def _pre_attention_scalar(attention: Attention, width: int) -> int | float:
  if attention.scale is None:
    return attention.head_width or width // attention.heads
  scalar = attention.scale**-2
  return round(scalar) if math.isclose(scalar, round(scalar), rel_tol=1e-9) else scalar


def _norm(path: str, name: str) -> Entry:
  return Entry(f"{path}/scale", f"{name}.weight", shift=1.0)


FAMILY = Family(
  name="gemma3",
  architecture="Gemma3ForCausalLM",
  to_config=to_config,
  from_config=from_config,
  layer=(
    _norm("mixer_norm", "layers.{i}.input_layernorm"),
    *SELF_ATTENTION,
    _norm("mixer/query_norm", "layers.{i}.self_attn.q_norm"),
    _norm("mixer/key_norm", "layers.{i}.self_attn.k_norm"),
    _norm("mixer_post_norm", "layers.{i}.post_attention_layernorm"),
    _norm("ffn_norm", "layers.{i}.pre_feedforward_layernorm"),
    *GATED_MLP,
    _norm("ffn_post_norm", "layers.{i}.post_feedforward_layernorm"),
  ),
  rest=(
    Entry("embed/embedding", "embed_tokens.weight"),
    _norm("final_norm", "norm"),
    *linear("head", "lm_head", bias=False),
  ),
  prefixes=("model.", "language_model.model.", "model.language_model.", ""),
  ignored=(r"(model\.)?vision_tower\..*", r"(model\.)?multi_modal_projector\..*"),
)
