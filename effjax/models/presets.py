"""Named configurations: published models, and small ones for experiments."""

import math

from effjax.attention.masks import Causal
from effjax.attention.multi_head import Attention
from effjax.layers import MLP, RMSNorm, Rope
from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.models.families import bert, deepseek, gemma, mixtral, olmoe, opt, qwen_moe


def llama(
  vocab_size: int,
  width: int,
  layers: int,
  heads: int,
  kv_heads: int | None = None,
  hidden: int | None = None,
  *,
  context: int = 2048,
  tied: bool = True,
  rope_theta: float = 10_000.0,
  eps: float = 1e-5,
) -> TransformerConfig:
  """A Llama of any size; `hidden` is 8/3 · width, rounded up to a multiple of 32, if not given.

  Example:
    >>> llama(256, 64, 2, 4).layers[0].ffn.width
    192
  """
  hidden = 32 * math.ceil(width * 8 / 3 / 32) if hidden is None else hidden
  attention = Attention(
    heads=heads,
    kv_heads=kv_heads or heads,
    head_width=width // heads,
    mask=Causal(),
    rope=Rope(rope_theta),
  )
  return TransformerConfig(
    vocab_size=vocab_size,
    width=width,
    layers=(LayerSpec(attention, MLP(hidden, "silu", gated=True)),) * layers,
    norm=RMSNorm(eps),
    context=context,
    tied=tied,
    family="llama",
  )


def _opt(width: int, layers: int, heads: int, **others) -> TransformerConfig:
  fields = {"vocab_size": 50_272, "hidden_size": width, "ffn_dim": 4 * width}
  fields |= {"num_hidden_layers": layers, "num_attention_heads": heads}
  return opt.to_config(fields | others)


OPT = {
  "125M": _opt(768, 12, 12),
  "350M": _opt(1024, 24, 16, do_layer_norm_before=False, word_embed_proj_dim=512),
  "1.3B": _opt(2048, 24, 32),
  "2.7B": _opt(2560, 32, 32),
  "6.7B": _opt(4096, 32, 32),
  "13B": _opt(5120, 40, 40),
  "30B": _opt(7168, 48, 56),
  "66B": _opt(9216, 64, 72),
  "175B": _opt(12_288, 96, 96),
}

SMOLLM2_135M = llama(49_152, 576, 30, 9, 3, 1536, context=8192, rope_theta=100_000.0)

GEMMA3_270M = gemma.gemma3_config(
  {
    "vocab_size": 262_144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "max_position_embeddings": 32_768,
  }
)

MIXTRAL_8X7B = mixtral.to_config(
  {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 32_768,
    "router_aux_loss_coef": 0.02,
  }
)
QWEN15_MOE = qwen_moe.qwen2_config(
  {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 8192,
    "rope_theta": 1e6,
  }
)
OLMOE_1B_7B = olmoe.to_config(
  {
    "vocab_size": 50_304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
  }
)
DEEPSEEK_MOE_16B = deepseek.to_config(
  {
    "vocab_size": 102_400,
    "hidden_size": 2048,
    "intermediate_size": 10_944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 4096,
  }
)


def _bert(width: int, layers: int, heads: int) -> TransformerConfig:
  fields = {"vocab_size": 30_522, "hidden_size": width, "intermediate_size": 4 * width}
  return bert.to_config(fields | {"num_hidden_layers": layers, "num_attention_heads": heads})


BERT_BASE = _bert(768, 12, 12)
MINILM = _bert(384, 6, 12)

TINY = llama(512, 64, 2, 4, 2, context=256)
SMALL = llama(4096, 256, 6, 8, 4, context=1024)

PRESETS: dict[str, TransformerConfig] = {
  "tiny": TINY,
  "small": SMALL,
  "smollm2-135m": SMOLLM2_135M,
  "gemma3-270m": GEMMA3_270M,
  "bert-base": BERT_BASE,
  "minilm": MINILM,
  "mixtral-8x7b": MIXTRAL_8X7B,
  "qwen1.5-moe-a2.7b": QWEN15_MOE,
  "olmoe-1b-7b": OLMOE_1B_7B,
  "deepseek-moe-16b": DEEPSEEK_MOE_16B,
  **{f"opt-{size.lower()}": config for size, config in OPT.items()},
}


def preset(name: str) -> TransformerConfig:
  """The configuration called `name`.

  Raises:
    ValueError: for an unknown name.

  Example:
    >>> preset("smollm2-135m").width
    576
  """
  if name not in PRESETS:
    raise ValueError(f"preset {name!r}; allowed: {', '.join(PRESETS)}")
  return PRESETS[name]
