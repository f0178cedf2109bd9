"""OLMoE (arXiv 2409.02060): a mixture in every layer, queries and keys normed over all heads."""

from typing import Any

from effjax.layers.spec import TransformerConfig
from effjax.models.families import decoders, mixture
from effjax.models.families.fields import Fields, complete
from effjax.models.families.table import HEAD_NORMS, SELF_ATTENTION
from effjax.moe import MoE

DEFAULTS = decoders.DEFAULTS | {
  "max_position_embeddings": 4096,
  "rms_norm_eps": 1e-5,
  "tie_word_embeddings": False,
  "attention_bias": False,
  "num_experts": 64,
  "num_experts_per_tok": 8,
  "norm_topk_prob": False,
  "router_aux_loss_coef": 0.01,
}
ALIASES = {"num_local_experts": "num_experts"}


@complete(DEFAULTS, ALIASES)
def to_config(fields: Fields) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "olmoe"."""
  fields.need("clip_qkv", None)
  heads, width = decoders.heads(fields), fields.integer("hidden_size")
  if heads["heads"] * heads["head_width"] != width:
    raise fields.wrong("head_dim", f"null, hidden_size={width} / num_attention_heads")
  bias, renormalize = fields.flag("attention_bias"), fields.flag("norm_topk_prob")
  router = mixture.router(fields, "num_experts", renormalize=renormalize)
  moe = MoE(router, mixture.mlp(fields, "intermediate_size"))
  norm = {"qk_norm": fields.eps("rms_norm_eps"), "qk_norm_joint": True}
  return decoders.read(
    fields,
    "olmoe",
    decoders.uniform(fields),
    decoders.one_rope(fields),
    attention={"use_bias": bias, "out_bias": bias, **norm},
    ffns=lambda i: moe,
  )


def from_config(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  mixer, _, moe = mixture.parts(config, "olmoe")
  return decoders.write(config, "olmoe", given=(mixer, moe.expert)) | {
    "attention_bias": mixer.use_bias,
    "num_experts": moe.router.experts,
    "num_experts_per_tok": moe.router.top_k,
    "norm_topk_prob": moe.router.renormalize,
    "router_aux_loss_coef": moe.router.load_balance,
  }


FAMILY = decoders.family(
  "olmoe",
  "OlmoeForCausalLM",
  to_config,
  from_config,
  layer=(*decoders.NORMS, *SELF_ATTENTION, *HEAD_NORMS, *mixture.entries()),
  stacked=mixture.stacked(),
)
