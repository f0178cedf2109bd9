"""Matrices of GGUF files that stay in the blocks that the file holds them in."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from effjax.core.trees import is_table
from effjax.kernels.quantized_matmul.gguf_blocks import SIZES
from effjax.layers.spec import TransformerConfig
from effjax.models.families.table import Entry, Family
from effjax.models.sources import PackedSource, TensorSource
from effjax.quant import GGUF

ALIGNMENT = 64


def tagged(
  config: TransformerConfig, family: Family, source: TensorSource, names: Mapping[str, str]
) -> TransformerConfig:
  """`config`, layers with tags of their own where the blocks of one are of other types.

  Args:
    config, family, source: of a model.
    names: the names that `family` gives its tensors → those in the source.

  Raises:
    ValueError: when the source has no blocks.
  """
  if not isinstance(source, PackedSource):
    raise ValueError(f"packed: {source.path} has no blocks; allowed: GGUF files")
  types = []
  for i in range(len(config.layers)):
    stored = (names.get(entry.name.format(i=i)) for entry in family.layer)
    types.append(tuple(source.block_type(name) for name in stored if name is not None))
  if len(set(types)) < 2:
    return config
  layers = zip(config.layers, types, strict=True)
  apart = tuple(dataclasses.replace(layer, tag=(layer.tag, *each)) for layer, each in layers)
  return dataclasses.replace(config, layers=apart)


def read(
  source: TensorSource,
  stored: Sequence[tuple[str, tuple[int, ...]]],
  entry: Entry,
  shape: tuple[int, ...],
  dtype: np.dtype,
) -> GGUF | None:
  """A parameter in the blocks of the file; None where it is no matrix, or has no such blocks.

  Args:
    source: the tensors.
    stored: those that the parameter consists of, each with its index where they are stacked.
    entry: where they lie in the layout of the family.
    shape: of the parameter.
    dtype: of the matrix that it stands for.
  """
  matrix = entry.transpose or is_table(entry.path)
  if not isinstance(source, PackedSource) or entry.shift or entry.together or not matrix:
    return None
  types = {source.block_type(name) for name, _ in stored}
  type = types.pop()
  if types or type is None:
    return None
  block, size = SIZES[type]
  *batch, rows, inputs = (*shape[:-2], shape[-1], shape[-2]) if entry.transpose else shape
  codes = aligned((*batch, rows, inputs // block * size), np.dtype(np.uint8))
  for name, index in stored:
    source.read_blocks(name, codes[index] if index else codes)
  return GGUF(codes, type=type, dtype=dtype, table=not entry.transpose)


def of_fields(sharding: Any, w: Any) -> Any:
  """Where the arrays of a weight go, from where its matrix would."""
  if w is None or not isinstance(sharding, NamedSharding):
    return sharding
  axes = (*sharding.spec, *[None] * (w.ndim - len(sharding.spec)))
  put = lambda spec: NamedSharding(sharding.mesh, spec)
  return jax.tree.map(put, w.specs(axes), is_leaf=lambda x: isinstance(x, PartitionSpec))


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """An array, not filled, where JAX on a CPU takes it over without copying it."""
  size = int(np.prod(shape)) * dtype.itemsize
  raw = np.empty(size + ALIGNMENT, np.uint8)
  start = -raw.ctypes.data % ALIGNMENT
  return raw[start : start + size].view(dtype).reshape(shape)
