"""GPT-2 (Radford et al., 2019): learned positions, one tensor for query, key and value."""

from typing import Any

from effjax.attention.masks import Causal
from effjax.attention.multi_head import Attention
from effjax.layers import MLP, LayerNorm
from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.models.families import reading
from effjax.models.families.fields import Fields, complete
from effjax.models.families.table import Entry, Family, layer_norm, linear

DEFAULTS = {
  "n_inner": None,
  "activation_function": "gelu_new",
  "layer_norm_epsilon": 1e-5,
  "n_positions": 1024,
  "tie_word_embeddings": True,
}
ALIASES = {
  "hidden_size": "n_embd",
  "num_hidden_layers": "n_layer",
  "num_attention_heads": "n_head",
  "max_position_embeddings": "n_positions",
  "n_ctx": "n_positions",
}


@complete(DEFAULTS, ALIASES)
def to_config(fields: Fields) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "gpt2"."""
  fields.need("scale_attn_weights", True, None)
  fields.need("scale_attn_by_inverse_layer_idx", False, None)
  width = fields.integer("n_embd")
  reading.width(fields, "n_embd", "n_head")
  attention = Attention(fields.integer("n_head"), mask=Causal(), use_bias=True, out_bias=True)
  hidden = fields.integer("n_inner", null=True) or 4 * width
  ffn = MLP(hidden, reading.activation(fields, "activation_function"), use_bias=True)
  return TransformerConfig(
    vocab_size=fields.integer("vocab_size"),
    width=width,
    layers=(LayerSpec(attention, ffn),) * fields.depth("n_layer"),
    norm=LayerNorm(fields.eps("layer_norm_epsilon")),
    positions="learned",
    context=fields.integer("n_positions"),
    tied=fields.flag("tie_word_embeddings"),
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
    "layer_norm_epsilon": reading.eps(config),
    "tie_word_embeddings": config.tied,
  }


def _projection(path: str, name: str) -> tuple[Entry, ...]:
  # GPT-2's matrices are [in, out], as ours are.
  return Entry(f"{path}/kernel", f"{name}.weight"), Entry(f"{path}/bias", f"{name}.bias")


_INPUTS = ("mixer/query", "mixer/key", "mixer/value")


def _fused(kind: str, name: str) -> tuple[Entry, ...]:
  paths = tuple(f"{path}/{kind}" for path in _INPUTS)
  return tuple(Entry(path, f"h.{{i}}.attn.c_attn.{name}", together=paths) for path in paths)


FAMILY = Family(
  name="gpt2",
  architecture="GPT2LMHeadModel",
  to_config=to_config,
  from_config=from_config,
  layer=(
    *layer_norm("mixer_norm", "h.{i}.ln_1"),
    *_fused("kernel", "weight"),
    *_fused("bias", "bias"),
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
