"""Llama and its like, SmolLM2 among them (arXiv 2302.13971, 2502.02737)."""

from collections.abc import Mapping
from typing import Any

from effjax.attention.masks import Causal
from effjax.attention.multi_head import Attention
from effjax.layers import MLP, RMSNorm
from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.models.families import reading
from effjax.models.families.table import GATED_MLP, SELF_ATTENTION, Entry, Family, linear


def to_config(config: Mapping[str, Any]) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "llama"."""
  get = lambda name: reading.field(config, name)
  heads = get("num_attention_heads")
  bias, theta = config.get("attention_bias", False), config.get("rope_theta") or 10_000.0
  attention = Attention(
    heads=heads,
    kv_heads=config.get("num_key_value_heads") or heads,
    head_width=config.get("head_dim") or get("hidden_size") // heads,
    mask=Causal(),
    rope=reading.rope(config.get("rope_parameters") or config.get("rope_scaling"), theta),
    use_bias=bias,
    out_bias=bias,
  )
  act = reading.activation(config, "hidden_act", "silu")
  ffn = MLP(get("intermediate_size"), act, gated=True, use_bias=config.get("mlp_bias", False))
  return TransformerConfig(
    vocab_size=get("vocab_size"),
    width=get("hidden_size"),
    layers=(LayerSpec(attention, ffn),) * get("num_hidden_layers"),
    norm=RMSNorm(config.get("rms_norm_eps", 1e-6)),
    context=config.get("max_position_embeddings", 2048),
    tied=config.get("tie_word_embeddings", False),
    family="llama",
  )


def from_config(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  attention, ffn = reading.first_layer(config, "llama", Attention, MLP)
  return {
    "model_type": "llama",
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "intermediate_size": ffn.width,
    "num_hidden_layers": len(config.layers),
    "num_attention_heads": attention.heads,
    "num_key_value_heads": attention.kv_heads or attention.heads,
    "head_dim": attention.head_width or config.width // attention.heads,
    "hidden_act": reading.activation_name(ffn.activation),
    "max_position_embeddings": config.context,
    "rms_norm_eps": getattr(config.norm, "eps", None),
    "rope_theta": getattr(attention.rope, "theta", None),
    "rope_scaling": attention.rope and reading.rope_scaling(attention.rope),
    "attention_bias": attention.use_bias,
    "mlp_bias": ffn.use_bias,
    "tie_word_embeddings": config.tied,
  }


FAMILY = Family(
  name="llama",
  architecture="LlamaForCausalLM",
  to_config=to_config,
  from_config=from_config,
  layer=(
    Entry("mixer_norm/scale", "layers.{i}.input_layernorm.weight"),
    *SELF_ATTENTION,
    Entry("ffn_norm/scale", "layers.{i}.post_attention_layernorm.weight"),
    *GATED_MLP,
  ),
  rest=(
    Entry("embed/embedding", "embed_tokens.weight"),
    Entry("final_norm/scale", "norm.weight"),
    *linear("head", "lm_head", bias=False),
  ),
  prefixes=("model.", ""),
  ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
