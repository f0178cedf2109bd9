"""Tiny checkpoints of every family, and random damage to their files."""

import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import tokenizers as hf

from effjax import models
from effjax.models import families, safetensors_files
from effjax.models.families import gguf_names
from effjax.models.gguf_file import GGUFFile
from effjax.models.tokenizers import PretrainedTokenizer, byte_level

DECODER = {
  "vocab_size": 280,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
}
ENCODER = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
GPT2 = {"vocab_size": 280, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
DISTIL = {"vocab_size": 280, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4}
OPT = {"ffn_dim": 24} | {k: v for k, v in ENCODER.items() if k != "intermediate_size"}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA = {"head_dim": 8, "sliding_window": 4}
MIXTURE = DECODER | {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
FINE = {"num_experts": 3, "moe_intermediate_size": 8}
SHAPES: dict[str, dict[str, Any]] = {
  "llama": DECODER | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
  "mistral": DECODER | {"sliding_window": 4},
  "qwen2": DECODER | {"rope_scaling": YARN},
  "qwen3": DECODER | {"head_dim": 8},
  "gemma2": DECODER | GEMMA,
  "gemma3_text": DECODER | GEMMA | {"sliding_window_pattern": 2},
  "phi3": DECODER | {"pad_token_id": 0},
  "smollm3": DECODER | {"no_rope_layer_interval": 2},
  "mixtral": MIXTURE | {"num_local_experts": 3},
  "qwen2_moe": MIXTURE | FINE | {"shared_expert_intermediate_size": 12, "mlp_only_layers": [0]},
  "qwen3_moe": MIXTURE | FINE | {"norm_topk_prob": True},
  "olmoe": MIXTURE | {"num_experts": 3, "norm_topk_prob": False},
  "gpt2": GPT2,
  "opt": OPT,
  "bert": ENCODER,
  "roberta": ENCODER,
  "distilbert": DISTIL | {"max_position_embeddings": 64},
}
VALUES: tuple[Any, ...] = (
  *(None, True, False, 0, 1, 2, -1, 3, 16, 10**7, 10**400, 0.5, 1e-30, 1e300, float("inf")),
  *("", "x", "gelu", "linear", [], {}, [1], [None], {"a": 1}, "../../x", [[]] * 9, float("nan")),
)
Damage = Callable[[np.random.Generator, Path], str]


def bases(root: Path) -> dict[str, Path]:
  """One checkpoint of each family as a folder, one folder in shards, and one GGUF file."""
  found = {name: _saved(root / name, name, fields) for name, fields in SHAPES.items()}
  found["shards"] = _sharded(_saved(root / "shards", "llama", DECODER))
  found["merges"] = _merges(_saved(root / "merges", "gpt2", GPT2))
  (root / "gguf").mkdir()
  found["gguf"] = _gguf(_saved(root / "plain", "llama", DECODER), root / "gguf" / "model.gguf")
  return found


def _saved(folder: Path, model_type: str, fields: dict[str, Any]) -> Path:
  config = families.of_model_type(model_type).to_config(fields)
  module, rng = models.Transformer(config), np.random.default_rng(0)
  shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
  draw = lambda like: (rng.normal(size=like.shape) * 0.3).astype(np.float32)
  model = models.Model(config, module, jax.tree.map(draw, shapes), _tokenizer())
  return models.save(model, folder)


def _tokenizer() -> PretrainedTokenizer:
  letters = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
  merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "Ġ")]
  tokens = ["<pad>", "<s>", "</s>", *letters, *(a + b for a, b in merges)]
  backend = byte_level({token: i for i, token in enumerate(tokens)}, merges, "gpt-2")
  backend.add_special_tokens([hf.AddedToken(t, normalized=False) for t in tokens[:3]])
  return PretrainedTokenizer(backend, 1, 2, 0)


def _merges(folder: Path) -> Path:
  """The folder with vocab.json and merges.txt in place of tokenizer.json."""
  model = json.loads((folder / "tokenizer.json").read_text())["model"]
  (folder / "tokenizer.json").unlink()
  (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
  lines = [" ".join(pair) for pair in model["merges"]]
  (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
  named = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}
  (folder / "tokenizer_config.json").write_text(json.dumps(named | {"pad_token": "<pad>"}))
  return folder


def _sharded(folder: Path) -> Path:
  source = safetensors_files.SafetensorsFolder(folder)
  home: dict[str, str] = {}
  for i, names in enumerate((source.names()[::2], source.names()[1::2])):
    shard = f"model-0000{i + 1}-of-00002.safetensors"
    values = {name: source.read(name) for name in names}
    stored: dict[str, safetensors_files.Stored] = {
      k: (v.shape, v.dtype, functools.partial(np.asarray, v)) for k, v in values.items()
    }
    safetensors_files.write(folder / shard, stored)
    home |= dict.fromkeys(names, shard)
  (folder / safetensors_files.SINGLE).unlink()
  (folder / safetensors_files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": home}))
  return folder


def _gguf(folder: Path, path: Path) -> Path:
  """The Llama in a folder as llama.cpp's converter lays it out."""
  writer, source = gguf.GGUFWriter(path, "llama"), safetensors_files.SafetensorsFolder(folder)
  fields = {"context_length": 64, "embedding_length": 16, "feed_forward_length": 24}
  fields |= {"block_count": 2, "attention.head_count": 4, "attention.head_count_kv": 2}
  fields |= {"vocab_size": 280, "rope.dimension_count": 4}
  for name, number in fields.items():
    writer.add_uint32(f"llama.{name}", number)
  writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
  names = {hf_name: ours for ours, hf_name in gguf_names.LAYER_NAMES["llama"].items()}
  top = {hf_name: ours for ours, hf_name in gguf_names.TOP_NAMES.items()}
  for name in source.names():
    stored, value = name.removeprefix("model."), source.read(name)
    if stored not in top:
      _, i, rest = stored.split(".", 2)
      stored, heads = f"blk.{i}.{names[rest.removesuffix('.weight')]}.weight", {"q": 4, "k": 2}
      if rest[len("self_attn.")] in heads and rest.startswith("self_attn."):
        split = value.reshape(heads[rest[len("self_attn.")]], 2, -1, value.shape[-1])
        value = np.ascontiguousarray(split.transpose(0, 2, 1, 3)).reshape(value.shape)
    writer.add_tensor(top.get(stored, stored), value)
  _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text())["model"])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def _add_tokenizer(writer: gguf.GGUFWriter, model: dict[str, Any]) -> None:
  tokens = sorted(model["vocab"], key=model["vocab"].get)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("gpt-2")
  writer.add_token_list(tokens)
  writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
  writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
  for role, number in (("bos", 1), ("eos", 2), ("pad", 0)):
    getattr(writer, f"add_{role}_token_id")(number)


def damaged(rng: np.random.Generator, path: Path) -> str:
  """Damages a checkpoint in place; says how."""
  if path.is_file():
    return bytes_of(rng, path, GGUFFile(path)._tensors["token_embd.weight"].start)
  weights = sorted(path.glob("*.safetensors"))
  described = sorted(path.glob("*.json"))
  kind = rng.integers(8)
  if kind < 4:
    return field_of(rng, _one(rng, described))
  if kind == 4:
    return bytes_of(rng, _one(rng, [*described, *path.glob("merges.txt")]))
  if kind == 5:
    file = _one(rng, weights)
    return bytes_of(rng, file, 8 + struct.unpack("<Q", file.read_bytes()[:8])[0])
  if kind == 6:
    return header_of(rng, _one(rng, weights))
  return place_of(rng, path)


def _one(rng: np.random.Generator, options: list) -> Any:
  return options[rng.integers(len(options))]


def field_of(rng: np.random.Generator, file: Path) -> str:
  """Another value for a field, at any depth; a field more, one less, or one that stands twice."""
  whole = json.loads(file.read_text())
  inside, name = whole, None
  while isinstance(inside, dict | list) and len(inside):
    owner, name = (
      inside,
      _one(rng, list(inside) if isinstance(inside, dict) else [*range(len(inside))]),
    )
    inside = owner[name]
    if rng.random() < 0.5:
      break
  if name is None:
    return f"{file.name}: nothing"
  action, value = rng.integers(6), _one(rng, list(VALUES))
  if action == 0:
    del owner[name]
  elif action == 1 and isinstance(owner, dict):
    owner["a_field_of_tomorrow"] = value
  else:
    owner[name] = value
  text = json.dumps(whole)
  if action == 2:
    text = text[:-1] + f', "{next(iter(whole))}": 1' + "}"
  file.write_text(text)
  what = ("gone", "beside another field", "one twice")[action] if action < 3 else repr(value)[:99]
  return f"{file.name}: {name!r} {what}"


def bytes_of(rng: np.random.Generator, file: Path, header: int | None = None) -> str:
  """Other bytes, mostly in the header; or fewer, more or none."""
  whole = bytearray(file.read_bytes())
  end = len(whole) if header is None or rng.random() < 0.2 else header
  action = rng.integers(6)
  if action < 3:
    at = int(rng.integers(end))
    whole[at] = int(rng.integers(256))
    what = f"byte {at} is {whole[at]}"
  elif action == 3:
    whole = whole[: int(rng.integers(end))]
    what = f"cut to {len(whole)}"
  elif action == 4:
    whole += bytes(int(rng.integers(1, 99)))
    what = "bytes more"
  else:
    at = int(rng.integers(max(1, end - 8)))
    whole[at : at + 8] = struct.pack("<Q", int(rng.integers(1 << 62)))
    what = f"8 bytes at {at}"
  file.write_bytes(whole)
  return f"{file.name}: {what}"


def header_of(rng: np.random.Generator, file: Path) -> str:
  """Another entry in the header of a safetensors file."""
  whole = file.read_bytes()
  base = 8 + struct.unpack("<Q", whole[:8])[0]
  header = json.loads(whole[8:base])
  names = [name for name in header if name != "__metadata__"]
  first, second = (_one(rng, names) for _ in range(2))
  action = rng.integers(6)
  text = None
  if action == 0:
    header[first]["data_offsets"] = header[second]["data_offsets"]
  elif action == 1:
    header[first]["data_offsets"] = [
      x + int(rng.integers(-3, 4)) for x in header[first]["data_offsets"]
    ]
  elif action == 2:
    text = json.dumps(header)[:-1] + f", {json.dumps(first)}: {json.dumps(header[second])}" + "}"
  elif action == 3:
    header[first][_one(rng, ["dtype", "shape", "data_offsets"])] = _one(rng, list(VALUES))
  elif action == 4:
    header[_one(rng, ["x", "model." + first, first.removeprefix("model.")])] = header.pop(first)
  else:
    header[first]["shape"] = header[first]["shape"][::-1]
  encoded = (text or json.dumps(header)).encode()
  file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + whole[base:])
  return f"{file.name}: header {action}, {first}, {second}"


def place_of(rng: np.random.Generator, folder: Path) -> str:
  """A file that is gone, empty, nested deeply or a link out of the folder; a shard elsewhere."""
  outside = folder.parent / "secret.safetensors"
  index = folder / safetensors_files.INDEX
  if index.is_file() and rng.random() < 0.7:
    home = json.loads(index.read_text())
    where = _one(rng, [f"../{outside.name}", str(outside), "model-9.safetensors", "", ".", "a\0b"])
    home["weight_map"][_one(rng, list(home["weight_map"]))] = where
    index.write_text(json.dumps(home))
    return f"{index.name}: shard {where!r}"
  file = _one(rng, [p for p in sorted(folder.iterdir()) if p.is_file()])
  action = rng.integers(4)
  if action == 3:
    file.unlink()
    file.symlink_to(outside)
  elif action == 2:
    file.write_text('{"a": ' * 100_000)
  else:
    file.unlink()
    if action:
      file.touch()
  return f"{file.name}: {('gone', 'empty', 'nested deeply', 'a link out')[action]}"
