"""Loading pretrained models tensor by tensor, each straight to where it shall be."""

import dataclasses
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
from effjax.models import blocks, families, gguf_tokenizers, packages, tokenizers
from effjax.models.families import gguf_names
from effjax.models.families.fields import Fields
from effjax.models.families.table import Family
from effjax.models.folders import Folder
from effjax.models.gguf_file import GGUFFile
from effjax.models.layout import Piece, plan_tensors
from effjax.models.model import Model, TokenIds
from effjax.models.safetensors_files import SafetensorsFolder
from effjax.models.sources import TensorSource
from effjax.models.tokenizers import PretrainedTokenizer
from effjax.models.transformer import Transformer

Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | PyTree


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A pretrained model on disk."""

  path: Path
  family: Family
  config: TransformerConfig
  source: TensorSource
  tokenizer: PretrainedTokenizer | None
  ids: TokenIds


def load(
  name_or_path: str | Path,
  dtype: DTypeLike = jnp.float32,
  sharding: Sharding | None = None,
  *,
  packed: bool = False,
) -> Model:
  """A pretrained model, read tensor by tensor.

  Each parameter is allocated once, stacked where its layers are scanned, filled from the file and
  put on its devices before the next is read: host memory stays under 1.3 × the model.

  Args:
    name_or_path: "smollm2-135m", "gemma3-270m", "minilm"; a GGUF file; or a Hugging Face folder.
    dtype: type of the parameters and of activations; scales of norms that a family stores less 1
      (Gemma) stay in float32, so that saving gives back what was stored.
    sharding: where each parameter goes: a function of its path and shape, or a tree of
      `jax.sharding.Sharding` like the parameters; None is the default device.
    packed: whether the matrices of a GGUF file stay in their blocks, as `quant.GGUF` weights, where
      the file has them so; layers whose blocks are of different types are not scanned together.

  Raises:
    ModuleNotFoundError: when a named model's package is missing; says how to install it.
    FileNotFoundError: for a folder without config.json or weights, and for a missing shard.
    ValueError: for an unknown name, a damaged file, an unsupported model, and tensors that are
      missing, unexpected, or of another shape than the configuration says; for `packed` and
      anything but a GGUF file.
  """
  checkpoint = open_checkpoint(packages.locate(name_or_path))
  if packed:
    names = canonical_names(checkpoint.family, checkpoint.source)
    config = blocks.tagged(checkpoint.config, checkpoint.family, checkpoint.source, names)
    checkpoint = dataclasses.replace(checkpoint, config=config)
  module = Transformer(checkpoint.config, dtype=dtype)
  params = read_params(checkpoint, module, dtype, sharding, packed=packed)
  return Model(checkpoint.config, module, params, checkpoint.tokenizer, checkpoint.ids)


def open_checkpoint(path: str | Path) -> Checkpoint:
  """Configuration, tensors and tokenizer of a GGUF file or a folder; no tensor is read."""
  path = Path(path)
  return _open_folder(path) if path.is_dir() else _open_gguf(path)


def _open_gguf(path: Path) -> Checkpoint:
  file = GGUFFile(path)
  fields = gguf_names.hf_fields(file)
  family = families.of_model_type(fields["model_type"])
  config = family.to_config(fields, f"{path}: metadata", len(file.names()))
  tokenizer = None
  if "tokenizer.ggml.model" in file.metadata:
    tokenizer = gguf_tokenizers.from_gguf(file.metadata, where=str(path))
  ids = gguf_tokenizers.token_ids(file.metadata, str(path))
  return Checkpoint(path, family, config, gguf_names.RenamedGGUF(file, fields), tokenizer, ids)


def _open_folder(path: Path) -> Checkpoint:
  folder = Folder(path)
  if not folder.has("config.json"):
    raise FileNotFoundError(f"{path}: no config.json; allowed: Hugging Face folders")
  fields, where = folder.json("config.json"), str(folder.file("config.json"))
  try:
    family = families.of_model_type(fields.get("model_type"))
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error
  source = SafetensorsFolder(path)
  for ending, parts in family.stacked.items():
    source.divide(ending, parts)
  config = family.to_config(fields, where, len(source.names()))
  try:
    tokenizer = tokenizers.from_folder(path)
  except FileNotFoundError:
    tokenizer = None
  config, ids = _as_stored(config, family, source), _token_ids(folder, tokenizer)
  return Checkpoint(path, family, config, source, tokenizer, ids)


def _token_ids(folder: Folder, tokenizer: PretrainedTokenizer | None) -> TokenIds:
  """Those of generation_config.json, else of config.json, else of the tokenizer."""
  found = dataclasses.asdict(TokenIds.of(tokenizer))
  for name in ("config.json", "generation_config.json"):
    if folder.has(name):
      fields = Fields(str(folder.file(name)), folder.json(name))
      for role in found:
        given = fields.ids(f"{role}_token_id")
        if given:
          found[role] = given if role == "eos" else given[0]
  return TokenIds(**found)


def _as_stored(
  config: TransformerConfig, family: Family, source: TensorSource
) -> TransformerConfig:
  """The configuration, not tied where the file has a head unlike the token table."""
  stored, (table, head) = canonical_names(family, source), _ends(family)
  if not config.tied or table not in stored or head not in stored:
    return config
  same = np.array_equal(source.read(stored[head]), source.read(stored[table]))
  return config if same else dataclasses.replace(config, tied=False)


def _ends(family: Family) -> list[str]:
  """The names of the token table and of the head, "" where a family has none."""
  names = {entry.path: entry.name for entry in family.rest}
  return [names.get(path, "") for path in ("embed/embedding", "head/kernel")]


def canonical_names(family: Family, source: TensorSource) -> dict[str, str]:
  """The names that `family` gives its tensors → those in the file.

  Raises:
    ValueError: when two tensors of the file are one of the family's.
  """
  found: dict[str, str] = {}
  for name in source.names():
    other = found.setdefault(family.canonical(name), name)
    if other != name:
      raise ValueError(f"{source.path}: tensors {other!r} and {name!r} are one; allowed: either")
  return found


def read_params(
  checkpoint: Checkpoint,
  module: Transformer,
  dtype: DTypeLike = jnp.float32,
  sharding: Sharding | None = None,
  *,
  packed: bool = False,
) -> dict[str, Any]:
  """The parameters of `checkpoint`, laid out for `module`; arguments and errors as in `load`."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
  plan = plan_tensors(checkpoint.family, module.config, shapes)
  names = canonical_names(checkpoint.family, checkpoint.source)
  table, head = _ends(checkpoint.family)
  if module.config.tied and table not in names and head in names:
    names[table] = names.pop(head)
  _check(checkpoint, plan, trees.items(shapes), names)
  where = _placement(sharding, shapes)
  arrays: dict[str, Any] = {}
  largest_first = sorted(trees.items(shapes).items(), key=lambda item: -np.prod(item[1].shape))
  for path, leaf in largest_first:
    kind = plan[path][0].entry.dtype(np.dtype(dtype))
    there, stored = where(path, leaf.shape), [(names[p.tensor], p.index) for p in plan[path]]
    value: Any = None
    if packed:
      value = blocks.read(checkpoint.source, stored, plan[path][0].entry, leaf.shape, kind)
      there = blocks.of_fields(there, value)
    if value is None:
      value = _filled(checkpoint.source, names, plan[path], leaf.shape, kind)
    arrays[path] = jax.block_until_ready(jax.device_put(value, there))
  return jax.tree_util.tree_map_with_path(lambda path, _: arrays[trees.path_string(path)], shapes)


def _check(checkpoint: Checkpoint, plan: Mapping, shapes: Mapping, stored: Mapping) -> None:
  family, source, path = checkpoint.family, checkpoint.source, checkpoint.path
  wanted = {}
  for parameter, pieces in plan.items():
    for piece in pieces:
      shape = shapes[parameter].shape[len(piece.index) :]
      wanted[piece.tensor] = piece.entry.tensor_shape(shape, piece.span), parameter
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
  out = blocks.aligned(shape, dtype)
  for piece in pieces:
    part = out[piece.index] if piece.index else out
    piece.entry.load(source, names[piece.tensor], part, piece.span)
  return out


def _placement(sharding: Sharding | None, shapes: PyTree) -> Callable:
  if sharding is None:
    return lambda path, shape: None
  if callable(sharding):
    return sharding
  if trees.items(sharding).keys() != trees.items(shapes).keys():
    raise ValueError("sharding: a tree unlike the parameters; allowed: one Sharding a parameter")
  by_path = trees.items(sharding)
  return lambda path, shape: by_path[path]
