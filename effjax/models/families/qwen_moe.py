"""Qwen2-MoE (arXiv 2407.10671) and Qwen3-MoE (arXiv 2505.09388): Qwen with mixtures of experts.

Layers that a list or a period leaves out are dense. Qwen2's mixtures have a shared expert with a
gate.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from effjax.attention.multi_head import Attention
from effjax.layers import MLP
from effjax.layers.spec import TransformerConfig
from effjax.models.families import decoders, mixture, reading
from effjax.models.families.decoders import GLOBAL, LOCAL
from effjax.models.families.fields import Fields, complete
from effjax.models.families.table import HEAD_NORMS, linear
from effjax.moe import Gated, MoE

COMMON = decoders.DEFAULTS | {
  "max_position_embeddings": 32_768,
  "tie_word_embeddings": False,
  "use_sliding_window": False,
  "sliding_window": 4096,
  "decoder_sparse_step": 1,
  "mlp_only_layers": None,
  "norm_topk_prob": False,
  "router_aux_loss_coef": 0.001,
}
QWEN2_DEFAULTS = COMMON | {
  "num_key_value_heads": 16,
  "max_window_layers": 28,
  "layer_types": None,
  "moe_intermediate_size": 1408,
  "shared_expert_intermediate_size": 5632,
  "num_experts": 60,
  "num_experts_per_tok": 4,
  "qkv_bias": True,
}
QWEN3_DEFAULTS = COMMON | {
  "num_key_value_heads": 4,
  "moe_intermediate_size": 768,
  "num_experts": 128,
  "num_experts_per_tok": 8,
  "attention_bias": False,
}
QWEN3_ALIASES = {"num_local_experts": "num_experts"}


@complete(QWEN2_DEFAULTS)
def qwen2_config(fields: Fields) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "qwen2_moe"."""
  windowed = _is_windowed(fields)
  last = fields.integer("max_window_layers", least=0)
  kinds = decoders.layer_types(fields, lambda i: windowed and i % 2 == 0 and i < last)
  if LOCAL in kinds and not windowed:
    raise fields.wrong("use_sliding_window", f"true, where layer_types has {LOCAL!r}")
  shared = mixture.mlp(fields, "shared_expert_intermediate_size")
  return _read(fields, "qwen2_moe", kinds, {"use_bias": fields.flag("qkv_bias")}, Gated(shared))


@complete(QWEN3_DEFAULTS, QWEN3_ALIASES)
def qwen3_config(fields: Fields) -> TransformerConfig:
  """A `TransformerConfig` of a config.json of model type "qwen3_moe"."""
  fields.unused("max_window_layers")  # all layers see the window, where it is used
  kinds = decoders.uniform(fields, LOCAL if _is_windowed(fields) else GLOBAL)
  bias, eps = fields.flag("attention_bias"), fields.eps("rms_norm_eps")
  attention = {"use_bias": bias, "out_bias": bias, "qk_norm": eps}
  return _read(fields, "qwen3_moe", kinds, attention)


def _is_windowed(fields: Fields) -> bool:
  used = fields.flag("use_sliding_window")
  fields.unused("sliding_window")
  return used and fields.integer("sliding_window", null=True) is not None


def _read(
  fields: Fields,
  family: str,
  kinds: list[str],
  attention: Mapping[str, Any],
  shared: nn.Module | None = None,
) -> TransformerConfig:
  step, dense = fields.integer("decoder_sparse_step"), fields.items("mlp_only_layers", (int,))
  renormalize = fields.flag("norm_topk_prob")
  router = mixture.router(fields, "num_experts", renormalize=renormalize)
  moe = MoE(router, mixture.mlp(fields, "moe_intermediate_size"), shared)
  is_sparse = lambda i: (i + 1) % step == 0 and i not in (dense or ())
  return decoders.read(
    fields,
    family,
    kinds,
    decoders.one_rope(fields),
    attention=attention,
    ffns=mixture.some(fields, moe, is_sparse),
  )


def _written(
  config: TransformerConfig, family: str, mixer: Attention, dense: MLP, moe: Any
) -> dict[str, Any]:
  window, sparse = decoders.written_window(config), mixture.sparse(config)
  return decoders.write(config, family, given=(mixer, dense)) | {
    "use_sliding_window": window is not None,
    "sliding_window": window,
    "moe_intermediate_size": moe.expert.width,
    "num_experts": moe.router.experts,
    "num_experts_per_tok": moe.router.top_k,
    "norm_topk_prob": moe.router.renormalize,
    "router_aux_loss_coef": moe.router.load_balance,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [i for i in range(len(config.layers)) if i not in sparse],
  }


def from_qwen2(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  mixer, dense, moe = mixture.parts(config, "qwen2_moe", (Gated,))
  reading.check_kind("ffn.shared.inner", moe.shared.inner, "qwen2_moe", (MLP,))
  return _written(config, "qwen2_moe", mixer, dense, moe) | {
    "qkv_bias": mixer.use_bias,
    "shared_expert_intermediate_size": moe.shared.inner.width,
    "max_window_layers": len(config.layers),
    "layer_types": decoders.written_types(config),
  }


def from_qwen3(config: TransformerConfig) -> dict[str, Any]:
  """The config.json of a `TransformerConfig`."""
  mixer, dense, moe = mixture.parts(config, "qwen3_moe")
  return _written(config, "qwen3_moe", mixer, dense, moe) | {"attention_bias": mixer.use_bias}


SHARED = (
  *mixture.shared("ffn/shared/inner", "shared_expert"),
  *linear("ffn/shared/gate", "layers.{i}.mlp.shared_expert_gate", bias=False),
)
QWEN2 = decoders.family(
  "qwen2_moe",
  "Qwen2MoeForCausalLM",
  qwen2_config,
  from_qwen2,
  layer=(*decoders.LAYER, *mixture.entries(), *SHARED),
  stacked=mixture.stacked(),
)
QWEN3 = decoders.family(
  "qwen3_moe",
  "Qwen3MoeForCausalLM",
  qwen3_config,
  from_qwen3,
  layer=(*decoders.LAYER, *HEAD_NORMS, *mixture.entries()),
  stacked=mixture.stacked(),
)
