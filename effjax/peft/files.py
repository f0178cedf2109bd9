"""Files of adapters alone, in a format of our own: every method, over any base."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.flax import save_file

from effjax.core.register import REPRESENTATIONS
from effjax.core.typing import PyTree
from effjax.core.weights import Weight
from effjax.peft.detached import attach, detach

FILE = "adapters.safetensors"
FORMAT = "effjax adapters 2"


@functools.singledispatch
def save(params: PyTree, folder: str | Path) -> Path:
  """Writes what adapts `params`, and nothing of the base, to `folder`/adapters.safetensors.

  Of a `Model` it writes the folder that Hugging Face's peft does, where that library has the
  method and can hold what is there; `models.exchange` says what it can.

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
  arrays: dict[str, Any] = {}
  described = {place: _describe(adapter, place, arrays) for place, adapter in adapters.items()}
  new = path.with_name(f".{FILE}.new")
  save_file(arrays, new, {"format": FORMAT, "adapters": json.dumps(described)})
  new.replace(path)
  return path


@functools.singledispatch
def load(params: PyTree, folder: str | Path) -> PyTree:
  """`params` with the adapters that `save` wrote, over this base or another of its shapes.

  A `Model` takes the folders of Hugging Face's peft too, and comes back as one.

  Raises:
    FileNotFoundError: when the folder holds none.
    ValueError: for a damaged file, and as `attach`.

  Example:
    >>> import tempfile, jax, jax.numpy as jnp
    >>> from effjax.peft import lora
    >>> base = {"kernel": jnp.ones((3, 4))}
    >>> adapted = lora.add(base, jax.random.key(0), rank=2, targets="kernel")
    >>> folder = tempfile.mkdtemp()
    >>> path = save(adapted, folder)
    >>> bool((load(base, folder)["kernel"].a == adapted["kernel"].a).all())
    True
  """
  return attach(params, read(folder))


def read(folder: str | Path) -> dict[str, Any]:
  """Path → adapter without its base, as `save` wrote them.

  Raises:
    FileNotFoundError: when the folder holds none.
    ValueError: for a damaged file.
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
    return {place: _build(of, arrays) for place, of in described.items()}
  except Exception as error:  # safetensors raises its own types, a damaged header any.
    raise ValueError(f"{path}: damaged or not a file of adapters: {error}") from error


def _describe(value: Any, place: str, arrays: dict[str, Any]) -> Any:
  """A field of an adapter as JSON, an array being the name that it has in `arrays`."""
  within = lambda named: {n: _describe(x, f"{place}/{n}", arrays) for n, x in named.items()}
  if value is None:
    return None
  if isinstance(value, Weight):
    names = [field.name for field in dataclasses.fields(value) if field.name not in value.static]
    return {
      "type": type(value).__name__,
      "static": {name: getattr(value, name) for name in value.static},
      "fields": within({name: getattr(value, name) for name in names}),
    }
  if isinstance(value, Mapping):
    return {"entries": within(value)}
  if isinstance(value, tuple | list):
    return [*within(dict(enumerate(value))).values()]
  arrays[place] = value
  return place


def _build(described: Any, arrays: Mapping[str, Any]) -> Any:
  """What `_describe` described."""
  if described is None:
    return None
  if isinstance(described, str):
    return arrays[described]
  if isinstance(described, list):
    return tuple(_build(each, arrays) for each in described)
  if "entries" in described:
    return {name: _build(each, arrays) for name, each in described["entries"].items()}
  fields = {name: _build(each, arrays) for name, each in described["fields"].items()}
  static = {name: _hashable(value) for name, value in described["static"].items()}
  return REPRESENTATIONS[described["type"]](**fields, **static)


def _hashable(value: Any) -> Any:
  """A static field, in which JSON has made lists of the tuples."""
  return tuple(map(_hashable, value)) if isinstance(value, list) else value
