"""GGUF files as the folders they were made from: Hugging Face's names, fields and layout.

The table of a family then serves both. Undone here: llama-type files reorder the rows of query
and key for interleaved rotary pairs, and Gemma files hold the scale of a norm itself, where the
folder holds it less 1. What a file leaves out is filled in: Gemma 3's pattern of local layers
and their rotary base are those of its family.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

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
LAYER_NAMES = {
  "llama": ATTENTION | {"ffn_norm": "post_attention_layernorm"},
  "gemma3": ATTENTION
  | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
  },
}
TOP_NAMES = {
  "token_embd.weight": "embed_tokens.weight",
  "output_norm.weight": "norm.weight",
  "output.weight": "lm_head.weight",
}
GEMMA3_27B_LAYERS = 62
Fix = Callable[[np.ndarray], np.ndarray]


class RenamedGGUF:
  """A `TensorSource` over a `GGUFFile` with the names and layout of a Hugging Face folder."""

  def __init__(self, file: GGUFFile, config: Mapping[str, Any]):
    self.path, self._file, self._config = file.path, file, config
    self._names = {hf_name(config["model_type"], name): name for name in file.names()}

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

  def _fix(self, stored: str) -> Fix | None:
    if self._config["model_type"].startswith("gemma"):
      return (lambda x: x - np.float32(1)) if stored.endswith("norm.weight") else None
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    role = stored.split(".")[-2]
    return (lambda x: halved_rows(x, self._config[heads[role]])) if role in heads else None


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
  names = LAYER_NAMES["gemma3" if model_type.startswith("gemma3") else "llama"]
  if match is None or match[2] not in names:
    return name
  return f"layers.{match[1]}.{names[match[2]]}.{match[3]}"


def hf_fields(file: GGUFFile) -> dict[str, Any]:
  """The fields of config.json from the metadata.

  Raises:
    ValueError: for an architecture that is not supported, and for missing metadata.
  """
  architecture = file.metadata.get("general.architecture")
  if architecture not in ARCHITECTURES:
    allowed = ", ".join(ARCHITECTURES)
    raise ValueError(f"{file.path}: architecture {architecture!r}; allowed: {allowed}")

  def get(name: str, *default):
    key = f"{architecture}.{name}"
    if key not in file.metadata and not default:
      raise ValueError(f"{file.path}: metadata {key!r} is missing")
    return file.metadata.get(key, *default)

  heads = get("attention.head_count")
  fields = {
    "vocab_size": file.shape("token_embd.weight")[0],
    "hidden_size": get("embedding_length"),
    "intermediate_size": get("feed_forward_length"),
    "num_hidden_layers": get("block_count"),
    "num_attention_heads": heads,
    "num_key_value_heads": get("attention.head_count_kv", heads),
    "max_position_embeddings": get("context_length"),
    "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
    "rope_scaling": _rope_scaling(get),
    "tie_word_embeddings": "output.weight" not in file.names(),
    "attention_bias": "blk.0.attn_q.bias" in file.names(),
  }
  return fields | ARCHITECTURES[architecture](get, fields)


def _rope_scaling(get: Callable) -> dict[str, Any] | None:
  factor = get("rope.scaling.factor", 1.0)
  kind = get("rope.scaling.type", "linear" if factor != 1.0 else "none")
  return None if kind == "none" else {"rope_type": kind, "factor": factor}


def _llama(get: Callable, fields: Mapping[str, Any]) -> dict[str, Any]:
  head_width = fields["hidden_size"] // fields["num_attention_heads"]
  return {
    "model_type": "llama",
    "head_dim": get("attention.key_length", get("rope.dimension_count", head_width)),
    "rope_theta": get("rope.freq_base", 10_000.0),
  }


def _gemma3(get: Callable, fields: Mapping[str, Any]) -> dict[str, Any]:
  head_width = get("attention.key_length", 256)
  large = fields["num_hidden_layers"] == GEMMA3_27B_LAYERS
  scalar = fields["hidden_size"] // fields["num_attention_heads"] if large else head_width
  return {
    "model_type": "gemma3_text",
    "head_dim": head_width,
    "query_pre_attn_scalar": scalar,
    "sliding_window": get("attention.sliding_window"),
    "rope_theta": get("rope.freq_base", 1e6),
    "rope_local_base_freq": 1e4,
  }


ARCHITECTURES = {"llama": _llama, "gemma3": _gemma3}
