"""Saving a model to a folder that transformers opens and computes the same with."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from effjax.core import trees
from effjax.core.weights import is_weight
from effjax.models import families, safetensors_files
from effjax.models.layout import Piece, plan_tensors
from effjax.models.model import Model, TokenIds

# How a weight of each kind becomes a plain array.
_PLAIN = {
  "adapter": "merge it (peft.merge) or take it off (remove of the module that added it)",
  "quantised": "dequantize the weights (quant.dequantize)",
  "matrix": "materialize the weights",
  "wrapper": "materialize the weights",
}


def save(model: Model, folder: str | Path) -> Path:
  """Writes the configuration, model.safetensors and the tokenizer; all of it or nothing.

  The files are written beside `folder` and renamed when they are whole. Tensors are written one
  by one in the type of their parameter.

  Raises:
    FileExistsError: when `folder` is there and not empty.
    OSError: when the disk is full or cannot be written; nothing is left behind then.
    ValueError: when the family's layout cannot hold the model, and for parameters that are
      weight representations (LoRA, Int8, …): merge or materialize them first.
  """
  folder = Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise FileExistsError(f"{folder}: is there and not empty; allowed: a new or an empty folder")
  description = _description(model)
  tensors = _tensors(model)
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
  try:
    _write(temporary, description, tensors, model)
    temporary.chmod(0o755)
    os.replace(temporary, folder)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise
  return folder


def _write(folder: Path, description: dict[str, Any], tensors: dict, model: Model) -> None:
  (folder / "config.json").write_text(json.dumps(description, indent=2))
  if model.config.head is not None:
    generation = {name: ids for name, ids in _ids(model).items() if ids is not None}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
  if model.tokenizer is not None:
    model.tokenizer.save(folder)
  safetensors_files.write(folder / safetensors_files.SINGLE, tensors)


def _description(model: Model) -> dict[str, Any]:
  family = families.family_of(model.config)
  kind = trees.items(model.params)["embed/embedding"].dtype
  description = {"architectures": [family.architecture], **families.hf_config(model.config)}
  description["torch_dtype"] = str(jnp.dtype(kind))
  return _ids(model) | description


def _ids(model: Model) -> dict[str, Any]:
  ids = model.ids or TokenIds()
  eos = ids.eos[0] if len(ids.eos) == 1 else list(ids.eos) or None
  return {"bos_token_id": ids.bos, "eos_token_id": eos, "pad_token_id": ids.pad}


def _tensors(model: Model) -> dict[str, safetensors_files.Stored]:
  for path, leaf in trees.items(model.params).items():
    if is_weight(leaf):
      raise ValueError(
        f"parameter {path!r} is a {type(leaf).__name__}; allowed: arrays: {_PLAIN[leaf.kind]} first"
      )
  family, leaves = families.family_of(model.config), trees.items(model.params)
  blocks: dict[str, list[tuple[Piece, Any]]] = {}
  for path, pieces in plan_tensors(family, model.config, model.params).items():
    for piece in pieces:
      blocks.setdefault(family.written(piece.tensor), []).append((piece, leaves[path]))
  return {name: _stored(parts) for name, parts in blocks.items()}


def _stored(parts: list[tuple[Piece, Any]]) -> safetensors_files.Stored:
  parts = sorted(parts, key=lambda part: part[0].span or (0,))
  piece, leaf = parts[0]
  shape = piece.entry.tensor_shape(leaf.shape[len(piece.index) :], piece.span)

  def make() -> np.ndarray:
    values = [np.asarray(x[p.index] if p.index else x) for p, x in parts]
    return piece.entry.unload(values[0] if len(values) == 1 else np.concatenate(values, axis=-1))

  return shape, np.dtype(leaf.dtype), make
