"""Loading pretrained models tensor by tensor, each straight to where it shall be."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import trees
from effjax.core.typing import DTypeLike, PyTree
from effjax.layers.spec import TransformerConfig
from effjax.layers.stack import places
from effjax.models import families, gguf_tokenizers, packages, tokenizers
from effjax.models.families import gguf_names
from effjax.models.families.table import Entry, Family
from effjax.models.gguf_file import GGUFFile
from effjax.models.model import Model
from effjax.models.safetensors_files import SafetensorsFolder
from effjax.models.sources import TensorSource
from effjax.models.tokenizers import PretrainedTokenizer
from effjax.models.transformer import Transformer

Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | PyTree
ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A pretrained model on disk."""

  path: Path
  family: Family
  config: TransformerConfig
  source: TensorSource
  tokenizer: PretrainedTokenizer | None


@dataclasses.dataclass(frozen=True)
class Piece:
  """One tensor of one parameter: `index` in its stack, or None when it is not stacked."""

  entry: Entry
  tensor: str
  index: int | None


def load(
  name_or_path: str | Path, dtype: DTypeLike = jnp.float32, sharding: Sharding | None = None
) -> Model:
  """A pretrained model, read tensor by tensor.

  Each parameter is allocated once, stacked where its layers are scanned, filled from the file and
  put on its devices before the next is read: host memory stays under 1.3 × the model.

  Args:
    name_or_path: "smollm2-135m", "gemma3-270m", "minilm"; a GGUF file; or a Hugging Face folder.
    dtype: type of the parameters and of activations.
    sharding: where each parameter goes: a function of its path and shape, or a tree of
      `jax.sharding.Sharding` like the parameters; None is the default device.

  Raises:
    ModuleNotFoundError: when a named model's package is missing; says how to install it.
    FileNotFoundError: for a folder without config.json or weights, and for a missing shard.
    ValueError: for an unknown name, a damaged file, an unsupported model, and tensors that are
      missing, unexpected, or of another shape than the configuration says.
  """
  checkpoint = open_checkpoint(packages.locate(name_or_path))
  module = Transformer(checkpoint.config, dtype=dtype)
  params = read_params(checkpoint, module, dtype, sharding)
  return Model(checkpoint.config, module, params, checkpoint.tokenizer)


def open_checkpoint(path: str | Path) -> Checkpoint:
  """Configuration, tensors and tokenizer of a GGUF file or a folder; no tensor is read."""
  path = Path(path)
  return _open_folder(path) if path.is_dir() else _open_gguf(path)


def _open_gguf(path: Path) -> Checkpoint:
  file = GGUFFile(path)
  fields = gguf_names.hf_fields(file)
  family = families.of_model_type(fields["model_type"])
  source = gguf_names.RenamedGGUF(file, fields)
  tokenizer = gguf_tokenizers.from_gguf(file.metadata) if _has_tokenizer(file) else None
  return Checkpoint(path, family, family.to_config(fields), source, tokenizer)


def _has_tokenizer(file: GGUFFile) -> bool:
  return "tokenizer.ggml.model" in file.metadata


def _open_folder(path: Path) -> Checkpoint:
  if not (path / "config.json").is_file():
    raise FileNotFoundError(f"{path}: no config.json; allowed: Hugging Face folders")
  try:
    fields = json.loads((path / "config.json").read_text("utf-8"))
  except json.JSONDecodeError as error:
    raise ValueError(f"{path / 'config.json'}: damaged: {error}") from error
  family = families.of_model_type(fields.get("model_type"))
  config = family.to_config(fields)
  source = SafetensorsFolder(path)
  try:
    tokenizer = tokenizers.from_folder(path)
  except FileNotFoundError:
    tokenizer = None
  return Checkpoint(path, family, config, source, tokenizer)


def read_params(
  checkpoint: Checkpoint,
  module: Transformer,
  dtype: DTypeLike = jnp.float32,
  sharding: Sharding | None = None,
) -> dict[str, Any]:
  """The parameters of `checkpoint`, laid out for `module`; arguments and errors as in `load`."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
  plan = plan_tensors(checkpoint.family, module.config, shapes)
  _check(checkpoint, plan, trees.items(shapes))
  where = _placement(sharding, shapes)
  arrays = {}
  largest_first = sorted(trees.items(shapes).items(), key=lambda item: -np.prod(item[1].shape))
  names = {checkpoint.family.canonical(name): name for name in checkpoint.source.names()}
  for path, leaf in largest_first:
    value = _filled(checkpoint.source, names, plan[path], leaf.shape, np.dtype(dtype))
    arrays[path] = jax.block_until_ready(jax.device_put(value, where(path, leaf.shape)))
  return jax.tree_util.tree_map_with_path(lambda path, _: arrays[trees.path_string(path)], shapes)


def plan_tensors(
  family: Family, config: TransformerConfig, params: PyTree
) -> dict[str, list[Piece]]:
  """For the path of each parameter, the tensors it consists of.

  Raises:
    ValueError: for a parameter that the family has no tensor for.
  """
  shapes = trees.items(params)
  plan: dict[str, list[Piece]] = {}
  for entry in family.rest:
    if entry.path in shapes:
      plan[entry.path] = [Piece(entry, entry.name, None)]
  for i, (segment, name, index) in enumerate(places(config)):
    for entry in family.layer:
      path = f"{segment}/{name}/{entry.path}"
      if path in shapes:
        plan.setdefault(path, []).append(Piece(entry, entry.name.format(i=i), index))
  for path in shapes:
    if path not in plan:
      raise ValueError(f"parameter {path!r} has no place in the layout of family {family.name!r}")
  return plan


def _check(checkpoint: Checkpoint, plan: Mapping[str, list[Piece]], shapes: Mapping) -> None:
  family, source, path = checkpoint.family, checkpoint.source, checkpoint.path
  stored = {family.canonical(name): name for name in source.names()}
  wanted = {}
  for parameter, pieces in plan.items():
    for piece in pieces:
      shape = shapes[parameter].shape[0 if piece.index is None else 1 :]
      wanted[piece.tensor] = piece.entry.tensor_shape(shape), parameter
  missing = [name for name in wanted if name not in stored]
  if missing:
    raise ValueError(f"{path}: missing tensors: {trees.some(missing)}")
  for name, (shape, parameter) in wanted.items():
    if source.shape(stored[name]) != shape:
      raise ValueError(
        f"{path}: tensor {stored[name]!r} has shape {source.shape(stored[name])}; "
        f"the configuration wants {shape} (parameter {parameter!r})"
      )
  ignored = [*family.ignored, *([r"lm_head\.weight"] if checkpoint.config.tied else [])]
  known = lambda name: name in wanted or any(re.fullmatch(rule, name) for rule in ignored)
  unexpected = [stored[name] for name in stored if not known(name)]
  if unexpected:
    raise ValueError(f"{path}: unexpected tensors: {trees.some(unexpected)}")


def _filled(source: TensorSource, names: Mapping, pieces: list[Piece], shape: tuple, dtype):
  out = _aligned(shape, dtype)
  for piece in pieces:
    part = out if piece.index is None else out[piece.index]
    piece.entry.load(source, names[piece.tensor], part)
  return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  # JAX on CPU takes an aligned array over without copying it.
  size = int(np.prod(shape)) * dtype.itemsize
  raw = np.empty(size + ALIGNMENT, np.uint8)
  start = -raw.ctypes.data % ALIGNMENT
  return raw[start : start + size].view(dtype).reshape(shape)


def _placement(sharding: Sharding | None, shapes: PyTree) -> Callable:
  if sharding is None:
    return lambda path, shape: None
  if callable(sharding):
    return sharding
  if trees.items(sharding).keys() != trees.items(shapes).keys():
    raise ValueError("sharding: a tree unlike the parameters; allowed: one Sharding a parameter")
  by_path = trees.items(sharding)
  return lambda path, shape: by_path[path]
