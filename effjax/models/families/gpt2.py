"""GPT-2 (Radford et al., 2019): learned positions, one tensor for query, key and value."""

from collections.abc import Mapping
from typing import Any

from effjax.attention.masks import Causal
from effjax.attention.multi_head import Attention
from effjax.layers import MLP, LayerNorm
from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.models.families import reading
from effjax.models.families.table import Entry, Family, layer_norm, linear


def to_config(config: Mapping[str, Any]) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "gpt2"."""
  get = lambda name: reading.field(config, name)
  reading.need(config, "scale_attn_weights", True)
  reading.need(config, "scale_attn_by_inverse_layer_idx", False)
  reading.need(config, "add_cross_attention", False)
  attention = Attention(heads=get("n_head"), mask=Causal(), use_bias=True, out_bias=True)
  hidden = config.get("n_inner") or 4 * get("n_embd")
  act = reading.activation(config, "activation_function", "gelu_new")
  return TransformerConfig(
    vocab_size=get("vocab_size"),
    width=get("n_embd"),
    layers=(LayerSpec(attention, MLP(hidden, act, use_bias=True)),) * get("n_layer"),
    norm=LayerNorm(config.get("layer_norm_epsilon", 1e-5)),
    positions="learned",
    context=config.get("n_positions", 1024),
    tied=config.get("tie_word_embeddings", True),
    family="gpt2",
  )


def from_config(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  attention, ffn = reading.first_layer(config, "gpt2", Attention, MLP)
  return {
    "model_type": "gpt2",
    "vocab_size": config.vocab_size,
    "n_embd": config.width,
    "n_inner": ffn.width,
    "n_layer": len(config.layers),
    "n_head": attention.heads,
    "n_positions": config.context,
    "activation_function": reading.activation_name(ffn.activation),
    "layer_norm_epsilon": getattr(config.norm, "eps", None),
    "tie_word_embeddings": config.tied,
  }


def _projection(path: str, name: str) -> tuple[Entry, ...]:
  # GPT-2's matrices are [in, out], as ours are.
  return Entry(f"{path}/kernel", f"{name}.weight"), Entry(f"{path}/bias", f"{name}.bias")


def _fused(path: str, which: int) -> tuple[Entry, ...]:
  entries = _projection(path, "h.{i}.attn.c_attn")
  return tuple(Entry(entry.path, entry.name, part=(which, 3)) for entry in entries)


FAMILY = Family(
  name="gpt2",
  architecture="GPT2LMHeadModel",
  to_config=to_config,
  from_config=from_config,
  layer=(
    *layer_norm("mixer_norm", "h.{i}.ln_1"),
    *_fused("mixer/query", 0),
    *_fused("mixer/key", 1),
    *_fused("mixer/value", 2),
    *_projection("mixer/out", "h.{i}.attn.c_proj"),
    *layer_norm("ffn_norm", "h.{i}.ln_2"),
    *_projection("ffn/up", "h.{i}.mlp.c_fc"),
    *_projection("ffn/down", "h.{i}.mlp.c_proj"),
  ),
  rest=(
    Entry("embed/embedding", "wte.weight"),
    Entry("positions/embedding", "wpe.weight"),
    *layer_norm("final_norm", "ln_f"),
    *linear("head", "lm_head", bias=False),
  ),
  prefixes=("transformer.", ""),
  ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),
)
