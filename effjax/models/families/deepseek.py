"""DeepSeekMoE (arXiv 2401.06066): fine-grained experts beside shared ones, first layers dense."""

from typing import Any

from effjax.layers import MLP
from effjax.layers.spec import TransformerConfig
from effjax.models.families import decoders, mixture
from effjax.models.families.fields import Fields, complete
from effjax.moe import MoE

DEFAULTS = decoders.DEFAULTS | {
  "max_position_embeddings": 2048,
  "tie_word_embeddings": False,
  "attention_bias": False,
  "n_shared_experts": None,
  "norm_topk_prob": False,
  "first_k_dense_replace": 0,
  "moe_layer_freq": 1,
  "aux_loss_alpha": 0.001,
}


@complete(DEFAULTS)
def to_config(fields: Fields) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "deepseek"."""
  fields.need("scoring_func", "softmax")
  fields.unused("seq_aux")  # of the loss: whether it balances each sequence by itself
  first, period = fields.integer("first_k_dense_replace", least=0), fields.integer("moe_layer_freq")
  bias = fields.flag("attention_bias")
  return decoders.read(
    fields,
    "deepseek",
    decoders.uniform(fields),
    decoders.one_rope(fields),
    attention={"use_bias": bias, "out_bias": bias},
    ffns=mixture.some(fields, _mixture(fields), lambda i: i >= first and i % period == 0),
  )


def _mixture(fields: Fields) -> MoE:
  renormalize = fields.flag("norm_topk_prob")
  router = mixture.router(
    fields, "n_routed_experts", renormalize=renormalize, loss="aux_loss_alpha"
  )
  expert = mixture.mlp(fields, "moe_intermediate_size")
  count = fields.integer("n_shared_experts", null=True)
  return MoE(router, expert, None if count is None else expert.copy(width=count * expert.width))


def from_config(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  mixer, dense, moe = mixture.parts(config, "deepseek", (MLP, type(None)))
  first, *others = mixture.sparse(config)
  return decoders.write(config, "deepseek", given=(mixer, dense)) | {
    "attention_bias": mixer.use_bias,
    "moe_intermediate_size": moe.expert.width,
    "n_routed_experts": moe.router.experts,
    "n_shared_experts": _shared(moe),
    "num_experts_per_tok": moe.router.top_k,
    "norm_topk_prob": moe.router.renormalize,
    "scoring_func": "softmax",
    "first_k_dense_replace": first,
    "moe_layer_freq": (others[0] if others else len(config.layers)) - first,
    "aux_loss_alpha": moe.router.load_balance,
  }


def _shared(moe: Any) -> int | None:
  shared, expert = moe.shared, moe.expert
  if shared is None:
    return None
  if shared.width % expert.width:
    given = f"ffn.shared.width={shared.width}"
    raise ValueError(f"{given}; the layout of family 'deepseek' holds multiples of {expert.width}")
  return shared.width // expert.width


FAMILY = decoders.family(
  "deepseek",
  "DeepseekForCausalLM",
  to_config,
  from_config,
  layer=(*decoders.LAYER, *mixture.entries(), *mixture.shared("ffn/shared", "shared_experts")),
  stacked=mixture.stacked(),
)
