"""Published model families: how their configurations and tensors are those of a `Transformer`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.models.families import (
  bert,
  deepseek,
  distilbert,
  gemma,
  gpt2,
  llama,
  mistral,
  mixtral,
  mixture,
  olmoe,
  opt,
  phi3,
  qwen,
  qwen_moe,
  smollm3,
)
from effjax.models.families.table import Entry, Family

FAMILIES: dict[str, Family] = {
  family.name: family
  for family in (
    llama.FAMILY,
    gemma.GEMMA3,
    gpt2.FAMILY,
    opt.FAMILY,
    bert.FAMILY,
    bert.ROBERTA,
    distilbert.FAMILY,
    mistral.FAMILY,
    qwen.QWEN2,
    qwen.QWEN3,
    gemma.GEMMA2,
    phi3.FAMILY,
    smollm3.FAMILY,
    mixtral.FAMILY,
    qwen_moe.QWEN2,
    qwen_moe.QWEN3,
    olmoe.FAMILY,
    deepseek.FAMILY,
  )
}
MODEL_TYPES = {name: name for name in FAMILIES} | {"gemma3_text": "gemma3"}

__all__ = ["FAMILIES", "Entry", "Family", "family_of", "hf_config", "of_model_type"]


def of_model_type(model_type: Any) -> Family:
  """The family of config.json's `model_type`.

  Raises:
    ValueError: for an unknown one.
  """
  if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
    raise ValueError(f"model_type {model_type!r}; allowed: {', '.join(MODEL_TYPES)}")
  return FAMILIES[MODEL_TYPES[model_type]]


def family_of(config: TransformerConfig) -> Family:
  """The family whose layout `config` saves to.

  Raises:
    ValueError: when `config.family` names none.
  """
  if config.family not in FAMILIES:
    raise ValueError(f"config.family={config.family!r}; allowed: {', '.join(FAMILIES)}")
  return FAMILIES[config.family]


def hf_config(config: TransformerConfig) -> dict[str, Any]:
  """The config.json that describes `config`, and describes it wholly.

  Raises:
    ValueError: when the family's config.json cannot express something in `config`, naming it.

  Example:
    >>> from effjax.models import presets
    >>> hf_config(presets.SMOLLM2_135M)["num_key_value_heads"]
    3
  """
  family = family_of(config)
  described = family.from_config(config)
  wanted, got = (_comparable(c) for c in (config, family.to_config(described)))
  for name in wanted:
    if wanted[name] != got[name]:
      raise ValueError(
        f"{', '.join(_differences(name, wanted[name], got[name]))} is not something that the "
        f"layout of family {family.name!r} can express"
      )
  return described


def _comparable(config: TransformerConfig) -> Mapping[str, Any]:
  fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
  fields["layers"] = tuple(_resolved(spec, config.width) for spec in config.layers)
  return {name: value for name, value in fields.items() if name != "scan"}


def _resolved(spec: LayerSpec, width: int) -> LayerSpec:
  # Defaults spelled out, so that None and the value it stands for are equal; a tag, as `scan`, says
  # how parameters lie and not what is computed, and neither do a router's losses.
  mixer: Any = spec.mixer
  head_width = mixer.head_width or width // mixer.heads
  mixer = mixer.copy(
    kv_heads=mixer.kv_heads or mixer.heads,
    head_width=head_width,
    scale=head_width**-0.5 if mixer.scale is None else mixer.scale,
    implementation=None,
  )
  return dataclasses.replace(spec, mixer=mixer, ffn=mixture.computed(spec.ffn), tag=None)


def _differences(name: str, wanted: Any, got: Any) -> list[str]:
  """What is wanted where two values differ first, and within that, as deep as they are alike."""
  if isinstance(wanted, tuple) and isinstance(got, tuple) and len(wanted) == len(got):
    pairs = enumerate(zip(wanted, got, strict=True))
    index, (ours, theirs) = next(item for item in pairs if item[1][0] != item[1][1])
    return [f"{name}={ours}", *_differences(f"{name}[{index}]", ours, theirs)]
  if dataclasses.is_dataclass(wanted) and type(wanted) is type(got):
    for field in dataclasses.fields(wanted):
      ours, theirs = (getattr(value, field.name, None) for value in (wanted, got))
      if field.compare and ours != theirs:
        return _differences(f"{name}.{field.name}", ours, theirs)
  return [f"{name}={wanted}"]
