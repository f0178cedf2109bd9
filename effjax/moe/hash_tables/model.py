"""Tables in a model, and what a model knows that tables do not."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from effjax.core.known import check_ids
from effjax.core.typing import Array, Int, Integer, Params
from effjax.layers import TransformerConfig
from effjax.layers.forward import forward
from effjax.layers.stack import join, split
from effjax.moe.routers.hash import Hash

Table = Integer[Array | np.ndarray, "..."]  # [V] or [V, N]


def put(config: TransformerConfig, params: Params, tables: Table | Sequence[Table]) -> dict:
  """The parameters with other tables in its `Hash` routers.

  Args:
    config: a model with hash layers.
    params: its parameters.
    tables: one for all routers, the same hash in each; or one for each, from the first layer on.

  Raises:
    ValueError: for a model without hash layers, another number of tables than it has routers, a
      table of other ids or hashes than the router's, or of experts that are none of its E.

  Example:
    >>> from effjax.layers import MLP, LayerSpec
    >>> from effjax.moe import MoE
    >>> config = TransformerConfig(3, 4, (LayerSpec(None, MoE(Hash(2, 3), MLP(6))),))
    >>> ffn = {"router": {"table": jnp.zeros((3, 1), jnp.int32)}}
    >>> params = put(config, {"segments_0": {"layers_0": {"ffn": ffn}}}, np.array([1, 0, 1]))
    >>> params["segments_0"]["layers_0"]["ffn"]["router"]["table"].tolist()
    [[1], [0], [1]]
  """
  layers, rest = split(config, params)
  places = [
    (index, path, router)
    for index, spec in enumerate(config.layers)
    for place, module in spec.modules.items()
    for path, router in _hashes((place,), module)
  ]
  each = [tables] * len(places) if hasattr(tables, "shape") else list(tables)
  if not places or len(each) != len(places):
    allowed = f"one, or as many as the model has Hash routers, {len(places)}"
    raise ValueError(f"hash_tables.put: {len(each)} tables; allowed: {allowed}")
  for (index, path, router), table in zip(places, each, strict=True):
    where = f"hash_tables.put: layer {index}: {'/'.join(path)}"
    layers[index] = _with(layers[index], (*path, "table"), _checked(where, router, table))
  return join(config, layers, rest)


def predicted_ids(
  module: nn.Module, params: Params, batch: Mapping[str, Array | np.ndarray]
) -> Int[Array, "B T"]:
  """The id that a model finds likeliest after each token, −1 at padding: the fact `predicted`.

  Args:
    module: a model that gives logits, such as the dense baseline.
    params: its parameters.
    batch: tokens [B, T] and what else it reads; other entries are left alone.

  Example:
    >>> module = nn.Embed(3, 3, embedding_init=nn.initializers.zeros)
    >>> params = {"embedding": jnp.roll(jnp.eye(3), 1, axis=1)}
    >>> predicted_ids(module, params, {"tokens": jnp.array([[0, 1, 2]])}).tolist()
    [[1, 2, 0]]
  """
  logits, _ = forward(module, params, batch, read=batch, collections=())
  ids, segments = jnp.argmax(logits, axis=-1).astype(jnp.int32), batch.get("segment_ids")
  return ids if segments is None else jnp.where(segments >= 0, ids, -1)


def _hashes(path: tuple[str, ...], module: nn.Module) -> Iterator[tuple[tuple[str, ...], Hash]]:
  """Path and router of every `Hash` in a module and in what its fields hold."""
  if isinstance(module, Hash):
    yield path, module
  for field in dataclasses.fields(module):
    inner = getattr(module, field.name, None)
    if isinstance(inner, nn.Module) and field.name != "parent":
      yield from _hashes((*path, field.name), inner)


def _checked(where: str, router: Hash, table: Any) -> Array:
  """The table as the router's parameter."""
  wanted = (int(router.entries), int(router.hashes))
  found = table if hasattr(table, "shape") else np.asarray(table)
  shape = (*found.shape, 1) if found.ndim == 1 else tuple(found.shape)
  if shape != wanted:
    allowed = f"{wanted}, of {wanted[0]} ids and {wanted[1]} hashes"
    raise ValueError(f"{where}: table {tuple(found.shape)}; allowed: {allowed}")
  check_ids(f"{where}: table", found, router.experts)
  return jnp.asarray(found, jnp.int32).reshape(wanted)


def _with(tree: Mapping[str, Any], path: tuple[str, ...], leaf: Array) -> dict[str, Any]:
  """`tree` with another leaf at `path`."""
  first, *rest = path
  return {**tree, first: _with(tree[first], tuple(rest), leaf) if rest else leaf}
