"""Adapters apart from the model that they adapt: taken off, put on, saved and loaded alone."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from safetensors import safe_open
from safetensors.flax import save_file

from effjax.core import trees
from effjax.core.register import REPRESENTATIONS
from effjax.core.typing import PyTree
from effjax.core.weights import Weight
from effjax.peft.adapter import is_adapter

FILE = "adapters.safetensors"
FORMAT = "effjax adapters 1"


def detach(params: PyTree) -> tuple[PyTree, dict[str, Weight]]:
  """`params` without its adapters, and path → adapter without its base (None stands for it).

  Raises:
    ValueError: when `params` holds no adapter.

  Example:
    >>> import jax.numpy as jnp
    >>> from effjax.peft import lora
    >>> params = {"kernel": jnp.ones((3, 4))}
    >>> base, adapters = detach(lora.add(params, jax.random.key(0), rank=2, targets="kernel"))
    >>> base["kernel"].shape, adapters["kernel"].a.shape, adapters["kernel"].base
    ((3, 4), (3, 2), None)
  """
  found = {path: leaf for path, leaf in trees.items(params).items() if is_adapter(leaf)}
  if not found:
    raise ValueError("params has no adapter; allowed: what lora.add returns")
  base = trees.update(params, lambda path, leaf: path in found, lambda path, leaf: _base(leaf))
  return base, {path: _without_base(leaf) for path, leaf in found.items()}


def attach(params: PyTree, adapters: Mapping[str, Weight]) -> PyTree:
  """`params` with the adapters at their paths: the inverse of `detach`, over this base or another.

  Raises:
    ValueError: when there is no parameter at a path, an adapter is there, or one does not fit it.
  """
  leaves = trees.items(params)
  for path in adapters:
    if path not in leaves:
      raise ValueError(f"adapters: params has nothing at {path!r}; allowed: {trees.some(leaves)}")
    if is_adapter(leaves[path]):
      raise ValueError(f"adapters: {path!r} has one already; merge or detach it first")

  def put(path: str, leaf: Any) -> Weight:
    try:
      return _over(adapters[path], leaf)
    except ValueError as error:
      raise ValueError(f"adapters: {path!r} {tuple(leaf.shape)}: {error}") from error

  return trees.update(params, lambda path, leaf: path in adapters, put)


def save(params: PyTree, folder: str | Path) -> Path:
  """Writes what adapts `params`, and nothing of the base, to `folder`/adapters.safetensors.

  Raises:
    ValueError: when `params` holds no adapter.
    FileExistsError: when the file is there already.
    OSError: when it cannot be written.
  """
  _, adapters = detach(params)
  path = Path(folder) / FILE
  if path.exists():
    raise FileExistsError(f"{path}: is there already; allowed: a folder without one")
  path.parent.mkdir(parents=True, exist_ok=True)
  arrays = {
    trees.path_string(place): x for place, x in jax.tree_util.tree_leaves_with_path(adapters)
  }
  described = {path: _describe(adapter) for path, adapter in adapters.items()}
  new = path.with_name(f".{FILE}.new")
  save_file(arrays, new, {"format": FORMAT, "adapters": json.dumps(described)})
  new.replace(path)
  return path


def load(params: PyTree, folder: str | Path) -> PyTree:
  """`params` with the adapters that `save` wrote, over this base or another of its shapes.

  Raises:
    FileNotFoundError: when the folder holds none.
    ValueError: for a damaged file, and as `attach`.

  Example:
    >>> import tempfile, jax.numpy as jnp
    >>> from effjax.peft import lora
    >>> base = {"kernel": jnp.ones((3, 4))}
    >>> adapted = lora.add(base, jax.random.key(0), rank=2, targets="kernel")
    >>> folder = tempfile.mkdtemp()
    >>> path = save(adapted, folder)
    >>> bool((load(base, folder)["kernel"].a == adapted["kernel"].a).all())
    True
  """
  path = Path(folder) / FILE
  if not path.is_file():
    raise FileNotFoundError(f"{path}: is not there; allowed: a folder that peft.save wrote")
  try:
    with safe_open(path, "flax") as file:
      metadata, names = file.metadata() or {}, list(file.keys())
      arrays = {name: file.get_tensor(name) for name in names}
    if metadata.get("format") != FORMAT:
      raise ValueError(f"format {metadata.get('format')!r}; allowed: {FORMAT!r}")
    described = json.loads(metadata["adapters"])
    adapters = {place: _build(of, place, arrays) for place, of in described.items()}
  except Exception as error:  # safetensors raises its own types, a damaged header any.
    raise ValueError(f"{path}: damaged or not a file of adapters: {error}") from error
  return attach(params, adapters)


def _base(leaf: Any) -> Any:
  return _base(leaf.base) if is_adapter(leaf) else leaf


def _without_base(leaf: Any) -> Any:
  return dataclasses.replace(leaf, base=_without_base(leaf.base)) if is_adapter(leaf) else None


def _over(adapter: Any, leaf: Any) -> Any:
  return leaf if adapter is None else dataclasses.replace(adapter, base=_over(adapter.base, leaf))


def _describe(adapter: Any) -> dict[str, Any] | None:
  """What a file says of an adapter besides its arrays, JSON."""
  if adapter is None:
    return None
  static = {name: getattr(adapter, name) for name in adapter.static}
  return {"type": type(adapter).__name__, "static": static, "base": _describe(adapter.base)}


def _build(described: Mapping[str, Any] | None, place: str, arrays: Mapping[str, Any]) -> Any:
  if described is None:
    return None
  cls: Any = REPRESENTATIONS[described["type"]]
  fields = [field.name for field in dataclasses.fields(cls)]
  own = {name: arrays[f"{place}/{name}"] for name in fields if f"{place}/{name}" in arrays}
  base = _build(described["base"], f"{place}/base", arrays)
  return cls(**own, **described["static"], base=base)
