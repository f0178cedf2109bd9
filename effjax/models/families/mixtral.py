"""Mixtral (arXiv 2401.04088): Mistral whose feed-forward layers are all mixtures of experts."""

from typing import Any

from effjax.layers.spec import TransformerConfig
from effjax.models.families import decoders, mixture
from effjax.models.families.fields import Fields, complete
from effjax.models.families.table import SELF_ATTENTION
from effjax.moe import MoE

DEFAULTS = decoders.DEFAULTS | {
  "num_key_value_heads": 8,
  "max_position_embeddings": 131_072,
  "rms_norm_eps": 1e-5,
  "rope_theta": 1e6,
  "tie_word_embeddings": False,
  "sliding_window": None,
  "num_local_experts": 8,
  "num_experts_per_tok": 2,
  "router_aux_loss_coef": 0.001,
}
ALIASES = {"num_experts": "num_local_experts"}
EXPERTS = "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}


@complete(DEFAULTS, ALIASES)
def to_config(fields: Fields) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "mixtral"."""
  fields.need("router_jitter_noise", 0.0, 0, None)
  windowed = fields.integer("sliding_window", null=True) is not None
  router = mixture.router(fields, "num_local_experts", renormalize=True)
  moe = MoE(router, mixture.mlp(fields, "intermediate_size"))
  return decoders.read(
    fields,
    "mixtral",
    decoders.uniform(fields, decoders.LOCAL if windowed else decoders.GLOBAL),
    decoders.one_rope(fields),
    attention={},
    ffns=lambda i: moe,
  )


def from_config(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  mixer, _, moe = mixture.parts(config, "mixtral")
  return decoders.write(config, "mixtral", given=(mixer, moe.expert)) | {
    "sliding_window": decoders.written_window(config),
    "num_local_experts": moe.router.experts,
    "num_experts_per_tok": moe.router.top_k,
    "router_aux_loss_coef": moe.router.load_balance,
  }


FAMILY = decoders.family(
  "mixtral",
  "MixtralForCausalLM",
  to_config,
  from_config,
  layer=(
    *decoders.NORMS,
    *SELF_ATTENTION,
    *mixture.entries(*EXPERTS),
  ),
  renamed={"mlp.gate.weight": "block_sparse_moe.gate.weight"},
  stacked=mixture.stacked(*EXPERTS),
)
