"""Decoders in Llama's layout: what their config.json say, and what their layers are.

A family states its optional fields with their values when left out (`defaults`), how it tells the
kind of each layer, and what is fixed for all of its models.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from effjax.attention.masks import Causal, SlidingWindow
from effjax.attention.multi_head import Attention
from effjax.layers import MLP, RMSNorm, Rope
from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.models.families import reading, rope
from effjax.models.families.fields import Fields
from effjax.models.families.table import GATED_MLP, SELF_ATTENTION, Entry, Family, linear

LOCAL, GLOBAL = "sliding_attention", "full_attention"
DEFAULTS = {
  "num_key_value_heads": None,
  "head_dim": None,
  "hidden_act": "silu",
  "rms_norm_eps": 1e-6,
  "rope_theta": 1e4,
  "original_max_position_embeddings": None,
}
# Llama's names, with its norms as they are.
NORMS = (
  Entry("mixer_norm/scale", "layers.{i}.input_layernorm.weight"),
  Entry("ffn_norm/scale", "layers.{i}.post_attention_layernorm.weight"),
)
LAYER = (*NORMS, *SELF_ATTENTION, *GATED_MLP)
REST = (
  Entry("embed/embedding", "embed_tokens.weight"),
  Entry("final_norm/scale", "norm.weight"),
  *linear("head", "lm_head", bias=False),
)


def family(name: str, architecture: str, to_config: Callable, from_config: Callable, **others):
  """A `Family` in Llama's layout; `others` are its fields where they differ."""
  layout = {
    "layer": LAYER,
    "rest": REST,
    "prefixes": ("model.", ""),
    "ignored": (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
  }
  return Family(name, architecture, to_config, from_config, **(layout | others))


def read(
  fields: Fields,
  family: str,
  kinds: Sequence[str],
  ropes: Callable[[int], Rope | None],
  *,
  attention: Mapping[str, Any],
  mlp_bias: bool = False,
  act: str = "hidden_act",
  ffns: Callable[[int], nn.Module] | None = None,
  **others: Any,
) -> TransformerConfig:
  """The configuration of a model whose fields are those of Llama, except for what is given.

  Args:
    fields: of the family.
    family: its name.
    kinds: `LOCAL` or `GLOBAL`, for each layer.
    ropes: number of a layer → its rotary positions.
    attention: fields of `Attention` of all layers, besides heads, widths, masks and positions.
    mlp_bias: whether the feed-forward layers have biases.
    act: the field that names the activation.
    ffns: number of a layer → its feed-forward layer; None where all have gated MLPs.
    **others: fields of `TransformerConfig`.
  """
  base = Attention(**heads(fields), **attention)
  ffns = ffns or _mlps(fields, act, mlp_bias)
  masks = {kind: _mask(fields, kind) for kind in set(kinds)}
  # Equal layers are one object, so that telling them apart takes no time.
  made: dict[tuple, LayerSpec] = {}

  def spec(i: int) -> LayerSpec:
    place = kinds[i], ropes(i), ffns(i)
    if place not in made:
      made[place] = LayerSpec(base.copy(mask=masks[kinds[i]], rope=place[1]), place[2])
    return made[place]

  layers = tuple(map(spec, range(len(kinds))))
  shape = {
    "vocab_size": fields.integer("vocab_size"),
    "width": fields.integer("hidden_size"),
    "norm": RMSNorm(fields.eps("rms_norm_eps")),
    "context": longest(fields, layers),
    "tied": fields.flag("tie_word_embeddings"),
    "family": family,
  }
  return TransformerConfig(layers=layers, **(shape | others))


def _mlps(fields: Fields, act: str, use_bias: bool) -> Callable[[int], nn.Module]:
  ffn = MLP(fields.integer("intermediate_size"), reading.activation(fields, act), True, use_bias)
  return lambda i: ffn


def heads(fields: Fields) -> dict[str, Any]:
  """The fields of `Attention` that say how many heads there are, and how wide."""
  number, width = fields.integer("num_attention_heads"), fields.integer("head_dim", null=True)
  kv_heads = fields.integer("num_key_value_heads", null=True) or number
  if number % kv_heads:
    raise fields.wrong("num_key_value_heads", f"divisors of num_attention_heads={number}")
  width = width or reading.width(fields, "hidden_size", "num_attention_heads")
  return {"heads": number, "kv_heads": kv_heads, "head_width": width}


def one_rope(fields: Fields, **options: Any) -> Callable[[int], Rope]:
  """The rotary positions of a family that has the same in all layers."""
  found = rope.read(
    rope.given(fields),
    theta=fields.number("rope_theta"),
    context=fields.integer("max_position_embeddings"),
    original=fields.integer("original_max_position_embeddings", null=True),
    **options,
  )
  return lambda i: found


def longest(fields: Fields, layers: Sequence[LayerSpec]) -> int:
  """The longest sequence: what is said, or more where scaling counts from before it."""
  said = fields.integer("max_position_embeddings")
  mixers: list[Any] = [spec.mixer for spec in layers]
  return max((rope.stretched(mixer.rope, said) for mixer in mixers), default=said)


def layer_types(fields: Fields, default: Callable[[int], bool]) -> list[str]:
  """The kind of each layer: `layer_types`, or local where `default` says so by its number."""
  count = fields.depth("num_hidden_layers")
  kinds = fields.items("layer_types", (str,))
  kinds = kinds or [LOCAL if default(i) else GLOBAL for i in range(count)]
  if set(kinds) - {LOCAL, GLOBAL} or len(kinds) != count:
    raise fields.wrong("layer_types", f"{count} of {LOCAL!r}, {GLOBAL!r}")
  return kinds


def uniform(fields: Fields, kind: str = GLOBAL) -> list[str]:
  """The same kind for every layer."""
  return [kind] * fields.depth("num_hidden_layers")


def _mask(fields: Fields, kind: str):
  # A window of w keys counts the query's own.
  return SlidingWindow(fields.integer("sliding_window") - 1, 0) if kind == LOCAL else Causal()


def write(
  config: TransformerConfig,
  family: str,
  act: str = "hidden_act",
  given: tuple[Attention, MLP] | None = None,
) -> dict[str, Any]:
  """The fields of Llama for a configuration; a family adds its own.

  Args:
    config: the configuration.
    family: its name.
    act: the field that names the activation.
    given: the modules that the fields are of; None is those of the first layer, and all layers
      have such.
  """
  attention, ffn = parts(config, family) if given is None else given
  rotary = first_rope(config)
  return {
    "model_type": family,
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "intermediate_size": ffn.width,
    "num_hidden_layers": len(config.layers),
    "num_attention_heads": attention.heads,
    "num_key_value_heads": attention.kv_heads or attention.heads,
    "head_dim": attention.head_width or config.width // attention.heads,
    act: reading.activation_name(ffn.activation),
    "max_position_embeddings": rope.unstretched(rotary, config.context),
    "rms_norm_eps": reading.eps(config),
    "tie_word_embeddings": config.tied,
    **(rope.write(rotary) if rotary else {}),
  }


def parts(config: TransformerConfig, family: str) -> tuple[Attention, MLP]:
  """Mixer and feed-forward of the first layer."""
  return reading.first_layer(config, family, Attention, MLP)


def first_rope(config: TransformerConfig, mask: type | None = None) -> Rope | None:
  """The rotary positions of the first layer that has some, of those with this kind of mask."""
  mixers: list[Any] = [spec.mixer for spec in config.layers]
  right = (m for m in mixers if mask is None or isinstance(m.mask, mask))
  return next((m.rope for m in right if m.rope is not None), None)


def written_types(config: TransformerConfig) -> list[str]:
  """The kind of each layer, `layer_types`."""
  mixers: list[Any] = [spec.mixer for spec in config.layers]
  return [LOCAL if isinstance(m.mask, SlidingWindow) else GLOBAL for m in mixers]


def written_window(config: TransformerConfig) -> int | None:
  """`sliding_window`: that of the first local layer, None where there is none."""
  mixers: list[Any] = [spec.mixer for spec in config.layers]
  windows = (m.mask.left for m in mixers if isinstance(m.mask, SlidingWindow))
  return next((left + 1 for left in windows if left is not None), None)
