"""GGUF files as the folders they were made from: Hugging Face's names, fields and layout.

The table of a family then serves both. Undone here: llama-type files reorder the rows of query
and key for interleaved rotary pairs, Gemma files hold the scale of a norm itself, where the folder
holds it less 1, and Llama 3's rotary scaling lies in a tensor, as a divisor for each frequency.
What a file leaves out is filled in: Gemma 3's pattern of local layers and their rotary base are
those of its family.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from effjax.models.families.decoders import GLOBAL, LOCAL
from effjax.models.families.fields import Fields
from effjax.models.gguf_file import GGUFFile

ATTENTION = {
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
  "attn_norm": "input_layernorm",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
PRE_NORM = ATTENTION | {"ffn_norm": "post_attention_layernorm"}
SANDWICH = ATTENTION | {
  "post_attention_norm": "post_attention_layernorm",
  "ffn_norm": "pre_feedforward_layernorm",
  "post_ffw_norm": "post_feedforward_layernorm",
}
LAYER_NAMES = {
  "llama": PRE_NORM,
  "gemma3": SANDWICH | HEAD_NORMS,
  "gemma2": SANDWICH,
  "qwen2": PRE_NORM,
  "qwen3": PRE_NORM | HEAD_NORMS,
}
TOP_NAMES = {
  "token_embd.weight": "embed_tokens.weight",
  "output_norm.weight": "norm.weight",
  "output.weight": "lm_head.weight",
}
ROPE_DIVISORS = "rope_freqs.weight"
GEMMA2_27B_LAYERS, GEMMA3_27B_LAYERS = 46, 62
Fix = Callable[[np.ndarray], np.ndarray]


class RenamedGGUF:
  """A `TensorSource` over a `GGUFFile` with the names and layout of a Hugging Face folder."""

  def __init__(self, file: GGUFFile, config: Mapping[str, Any]):
    self.path, self._file, self._config = file.path, file, config
    stored = (name for name in file.names() if name != ROPE_DIVISORS)
    self._names = {hf_name(config["model_type"], name): name for name in stored}

  def names(self) -> list[str]:
    return list(self._names)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._file.shape(self._names.get(name, name))

  def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
    stored = self._names.get(name, name)
    fix = self._fix(stored)
    if fix is None:
      return self._file.read(stored, out)
    value = fix(self._file.read(stored))
    if out is None:
      return value
    out[...] = value
    return out

  def block_type(self, name: str) -> str | None:
    return self._file.block_type(self._names.get(name, name))

  def read_blocks(self, name: str, out: np.ndarray) -> None:
    stored = self._names.get(name, name)
    self._file.read_blocks(stored, out)
    if fix := self._rows(stored):
      out[...] = fix(out)

  def _fix(self, stored: str) -> Fix | None:
    if self._config["model_type"].startswith("gemma"):
      return (lambda x: x - np.float32(1)) if stored.endswith("norm.weight") else None
    return self._rows(stored)

  def _rows(self, stored: str) -> Fix | None:
    """How the rows of a tensor are put in the order of a folder; None where they are in it."""
    kind = self._config["model_type"]
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    role = stored.split(".")[-2]
    if kind != "llama" or role not in heads:
      return None
    return lambda x: halved_rows(x, self._config[heads[role]])


def halved_rows(x: np.ndarray, heads: int) -> np.ndarray:
  """Rows in the order (i, i + H/2 are a rotary pair) from the order (2i, 2i + 1 are).

  Example:
    >>> halved_rows(np.arange(6), heads=1)
    array([0, 2, 4, 1, 3, 5])
  """
  pairs = x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:])
  return pairs.swapaxes(1, 2).reshape(x.shape)


def hf_name(model_type: str, name: str) -> str:
  """The name in a Hugging Face folder of the tensor `name`, or `name` where there is none."""
  if name in TOP_NAMES:
    return TOP_NAMES[name]
  match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
  names = LAYER_NAMES[model_type.removesuffix("_text")]
  if match is None or match[2] not in names:
    return name
  return f"layers.{int(match[1])}.{names[match[2]]}.{match[3]}"


@dataclasses.dataclass(frozen=True)
class Metadata:
  """The metadata of a file about its model; `get` reads one by its name in the architecture."""

  file: GGUFFile
  fields: Fields
  architecture: str

  @classmethod
  def of(cls, file: GGUFFile, architecture: str) -> "Metadata":
    about = ("general.type", "split.", "adapter.", f"{architecture}.")
    values = {k: v for k, v in file.metadata.items() if k.startswith(about)}
    defaults = {f"{architecture}.{name}": value for name, value in DEFAULTS.items()}
    fields = Fields(str(file.path), values, defaults, len(file.names()), noun="metadata")
    return cls(file, fields, architecture)

  def __contains__(self, name: str) -> bool:
    return f"{self.architecture}.{name}" in self.fields

  def integer(self, name: str, **options: Any) -> Any:
    return self.fields.integer(f"{self.architecture}.{name}", **options)

  def number(self, name: str, **options: Any) -> Any:
    return self.fields.number(f"{self.architecture}.{name}", **options)

  def need(self, name: str, *allowed: Any) -> Any:
    return self.fields.need(f"{self.architecture}.{name}", *allowed)

  def wrong(self, name: str, allowed: str) -> ValueError:
    return self.fields.wrong(f"{self.architecture}.{name}", allowed)

  def raw(self, name: str) -> Any:
    return self.fields.raw(f"{self.architecture}.{name}")


DEFAULTS = dict.fromkeys(
  (
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window_pattern",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
  )
)


def hf_fields(file: GGUFFile) -> dict[str, Any]:
  """The fields of config.json from the metadata.

  Raises:
    ValueError: for an architecture that is not supported, for metadata that are missing or wrong,
      and for those that would change the computation and are not known.
  """
  architecture = file.metadata.get("general.architecture")
  if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
    allowed = ", ".join(ARCHITECTURES)
    raise ValueError(f"{file.path}: architecture {architecture!r}; allowed: {allowed}")
  get = Metadata.of(file, architecture)
  get.fields.need("general.type", "model", None)
  get.fields.need("split.count", None, 0, 1)
  get.fields.unused("split.no", "split.tensors.count", f"{architecture}.tensor_data_layout")
  fields = _common(get)
  fields |= ARCHITECTURES[architecture](get, fields)
  get.fields.finish(())
  return fields


def _common(get: Metadata) -> dict[str, Any]:
  heads, names = get.integer("attention.head_count"), get.file.names()
  rows = get.file.shape("token_embd.weight")[0]
  get.need("vocab_size", None, rows)
  get.need("attention.causal", True, None)
  for name in ("expert_count", "expert_used_count"):
    get.need(name, 0, None)
  return {
    "vocab_size": rows,
    "hidden_size": get.integer("embedding_length"),
    "intermediate_size": get.integer("feed_forward_length"),
    "num_hidden_layers": get.fields.depth(f"{get.architecture}.block_count"),
    "num_attention_heads": heads,
    "num_key_value_heads": get.integer("attention.head_count_kv", null=True) or heads,
    "head_dim": _head_width(get, heads),
    "max_position_embeddings": get.integer("context_length"),
    "rms_norm_eps": get.number("attention.layer_norm_rms_epsilon"),
    "rope_scaling": _rope_scaling(get),
    "tie_word_embeddings": "output.weight" not in names,
  }


def _head_width(get: Metadata, heads: int) -> int:
  rotating = get.integer("rope.dimension_count", null=True)
  width = get.integer("attention.key_length", null=True)
  width = width or rotating or get.integer("embedding_length") // heads
  get.need("attention.value_length", None, width)
  get.need("rope.dimension_count", None, width)
  return width


def _rope_scaling(get: Metadata) -> dict[str, Any] | None:
  # llama.cpp's older files say the factor of linear scaling alone.
  factor = get.number("rope.scaling.factor", null=True) or 1.0
  factor = get.number("rope.scale_linear", null=True) or factor
  said = get.raw("rope.scaling.type")
  kind = said or ("linear" if factor != 1.0 else "none")
  if kind not in ("none", "linear", "yarn"):
    raise get.wrong("rope.scaling.type", "none, linear, yarn")
  get.fields.unused(f"{get.architecture}.rope.scaling.finetuned")
  original = get.integer("rope.scaling.original_context_length", null=True)
  if kind == "yarn":
    return {
      "rope_type": "yarn",
      "factor": factor,
      "original_max_position_embeddings": original,
      **_yarn(get, factor),
    }
  get.need("rope.scaling.attn_factor", None, 1.0)
  if ROPE_DIVISORS in get.file.names():
    return _divisors(get, kind)
  return None if kind == "none" else {"rope_type": "linear", "factor": factor}


def _yarn(get: Metadata, factor: float) -> dict[str, Any]:
  names = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
  found = {ours: get.number(f"rope.scaling.{name}", null=True) for ours, name in names.items()}
  amplitude = get.number("rope.scaling.attn_factor", null=True)
  if amplitude is not None:
    found["attention_factor"] = amplitude * (0.1 * np.log(max(factor, 1.0)).item() + 1.0)
  return {name: value for name, value in found.items() if value is not None}


def _divisors(get: Metadata, kind: str) -> dict[str, Any]:
  if kind != "none":
    raise get.wrong("rope.scaling.type", f"none beside the tensor {ROPE_DIVISORS}")
  divisors = get.file.read(ROPE_DIVISORS).reshape(-1).tolist()
  return {
    "rope_type": "longrope",
    "short_factor": divisors,
    "long_factor": divisors,
    "original_max_position_embeddings": get.integer("context_length"),
    "attention_factor": 1.0,
  }


def _llama(get: Metadata, fields: Mapping[str, Any]) -> dict[str, Any]:
  names = get.file.names()
  return {
    "model_type": "llama",
    "rope_theta": get.number("rope.freq_base", null=True) or 1e4,
    "attention_bias": "blk.0.attn_q.bias" in names,
    "mlp_bias": "blk.0.ffn_up.bias" in names,
  }


def _qwen2(get: Metadata, fields: Mapping[str, Any]) -> dict[str, Any]:
  return {"model_type": "qwen2", "rope_theta": get.number("rope.freq_base", null=True) or 1e4}


def _qwen3(get: Metadata, fields: Mapping[str, Any]) -> dict[str, Any]:
  bias = "blk.0.attn_q.bias" in get.file.names()
  return _qwen2(get, fields) | {"model_type": "qwen3", "attention_bias": bias}


def _gemma2(get: Metadata, fields: Mapping[str, Any]) -> dict[str, Any]:
  window = get.integer("attention.sliding_window")
  caps = ("attn_logit_softcapping", "final_logit_softcapping")
  return {
    "model_type": "gemma2",
    "sliding_window": window,
    "rope_theta": get.number("rope.freq_base", null=True) or 1e4,
    "query_pre_attn_scalar": _scalar(fields, GEMMA2_27B_LAYERS),
    **{name: get.number(name, null=True) for name in caps if name in get},
  }


def _gemma3(get: Metadata, fields: Mapping[str, Any]) -> dict[str, Any]:
  found = {
    "model_type": "gemma3_text",
    "query_pre_attn_scalar": _scalar(fields, GEMMA3_27B_LAYERS),
    "sliding_window": get.integer("attention.sliding_window"),
    "rope_theta": get.number("rope.freq_base", null=True) or 1e6,
    "rope_local_base_freq": get.number("rope.freq_base_swa", null=True) or 1e4,
    "final_logit_softcapping": get.number("final_logit_softcapping", null=True),
    "attn_logit_softcapping": get.number("attn_logit_softcapping", null=True),
  }
  return found | _pattern(get, fields["num_hidden_layers"])


def _pattern(get: Metadata, count: int) -> dict[str, Any]:
  """Which layers are local: every one but each so-manieth, or said for each layer."""
  name = "attention.sliding_window_pattern"
  said = get.raw(name)
  if isinstance(said, list):
    flags = get.fields.items(f"{get.architecture}.{name}", (bool,), count)
    return {"layer_types": [LOCAL if flag else GLOBAL for flag in flags]}
  return {"sliding_window_pattern": get.integer(name, null=True)}


def _scalar(fields: Mapping[str, Any], largest: int) -> int:
  """`query_pre_attn_scalar`: of the largest model D/N, of the others the width of a head."""
  of_largest = fields["hidden_size"] // fields["num_attention_heads"]
  return of_largest if fields["num_hidden_layers"] == largest else fields["head_dim"]


ARCHITECTURES = {
  "llama": _llama,
  "gemma3": _gemma3,
  "gemma2": _gemma2,
  "qwen2": _qwen2,
  "qwen3": _qwen3,
}
