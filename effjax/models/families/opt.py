"""OPT (arXiv 2205.01068); its 350M model is post-norm and embeds in half the width."""

from typing import Any

from effjax.attention.masks import Causal
from effjax.attention.multi_head import Attention
from effjax.layers import MLP, LayerNorm
from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.models.families import reading
from effjax.models.families.fields import Fields, complete
from effjax.models.families.table import Entry, Family, layer_norm, linear

POSITION_OFFSET = 2


DEFAULTS = {
  "activation_function": "relu",
  "enable_bias": True,
  "do_layer_norm_before": True,
  "_remove_final_layer_norm": False,
  "word_embed_proj_dim": None,
  "max_position_embeddings": 2048,
  "tie_word_embeddings": True,
}


@complete(DEFAULTS)
def to_config(fields: Fields) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "opt"."""
  fields.need("layer_norm_elementwise_affine", True, None)
  width, bias = fields.integer("hidden_size"), fields.flag("enable_bias")
  before, bare = fields.flag("do_layer_norm_before"), fields.flag("_remove_final_layer_norm")
  embed_width = fields.integer("word_embed_proj_dim", null=True) or width
  reading.width(fields, "hidden_size", "num_attention_heads")
  heads = fields.integer("num_attention_heads")
  attention = Attention(heads, mask=Causal(), use_bias=bias, out_bias=bias)
  act = reading.activation(fields, "activation_function")
  ffn = MLP(fields.integer("ffn_dim"), act, use_bias=bias)
  return TransformerConfig(
    vocab_size=fields.integer("vocab_size"),
    width=width,
    layers=(LayerSpec(attention, ffn),) * fields.depth("num_hidden_layers"),
    norm=LayerNorm(1e-5),
    arrangement="pre" if before else "post",
    final_norm=before and not bare,
    positions="learned",
    position_offset=POSITION_OFFSET,
    context=fields.integer("max_position_embeddings"),
    tied=fields.flag("tie_word_embeddings"),
    embed_width=None if embed_width == width else embed_width,
    family="opt",
  )


def from_config(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  attention, ffn = reading.first_layer(config, "opt", Attention, MLP)
  before = config.arrangement == "pre"
  return {
    "model_type": "opt",
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "word_embed_proj_dim": config.embed_width or config.width,
    "ffn_dim": ffn.width,
    "num_hidden_layers": len(config.layers),
    "num_attention_heads": attention.heads,
    "activation_function": reading.activation_name(ffn.activation),
    "max_position_embeddings": config.context,
    "do_layer_norm_before": before,
    "_remove_final_layer_norm": before and not config.final_norm,
    "enable_bias": attention.use_bias,
    "tie_word_embeddings": config.tied,
  }


FAMILY = Family(
  name="opt",
  architecture="OPTForCausalLM",
  to_config=to_config,
  from_config=from_config,
  layer=(
    *layer_norm("mixer_norm", "layers.{i}.self_attn_layer_norm"),
    *linear("mixer/query", "layers.{i}.self_attn.q_proj"),
    *linear("mixer/key", "layers.{i}.self_attn.k_proj"),
    *linear("mixer/value", "layers.{i}.self_attn.v_proj"),
    *linear("mixer/out", "layers.{i}.self_attn.out_proj"),
    *layer_norm("ffn_norm", "layers.{i}.final_layer_norm"),
    *linear("ffn/up", "layers.{i}.fc1"),
    *linear("ffn/down", "layers.{i}.fc2"),
  ),
  rest=(
    Entry("embed/embedding", "embed_tokens.weight"),
    Entry("positions/embedding", "embed_positions.weight"),
    *linear("embed_in", "project_in", bias=False),
    *linear("embed_out", "project_out", bias=False),
    *layer_norm("final_norm", "final_layer_norm"),
    *linear("head", "lm_head", bias=False),
  ),
  prefixes=("model.decoder.", "decoder.", ""),
)
