"""The modules that a published model consists of, and which of our parameters lie in each.

A layer of ours may be stacked with others, and a module of theirs may hold several parameters side
by side. A `Slot` names a parameter of one layer whatever it is stacked with.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import trees, weights
from effjax.core.typing import Params, PyTree
from effjax.core.weights import Weight
from effjax.layers import stack
from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.models import families
from effjax.models.families.table import Entry, Family, Span
from effjax.models.layout import plan_tensors
from effjax.peft.detached import attach


@dataclasses.dataclass(frozen=True)
class Slot:
  """A parameter: the number of its layer, or None outside the layers, and its path from there."""

  layer: int | None
  path: str


TABLE, HEAD = Slot(None, "embed/embedding"), Slot(None, "head/kernel")
Adapters = dict[Slot, Any]  # a `Weight` without a base for each
Adapted = tuple[TransformerConfig, Params]


@dataclasses.dataclass(frozen=True)
class Part:
  """A parameter in a tensor: all of it, or the columns that `span` says.

  Attributes:
    shape: of the parameter in one layer.
  """

  slot: Slot
  entry: Entry
  span: Span | None
  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Module:
  """A module of the published model.

  Attributes:
    name: its name as the family's table has it, "layers.3.self_attn.q_proj".
    local: the same without the layer, "self_attn.q_proj".
    tensors: "weight" and "bias", as far as it has them, → the parameters in it.
  """

  name: str
  local: str
  tensors: Mapping[str, tuple[Part, ...]]

  @property
  def parts(self) -> tuple[Part, ...]:
    return self.tensors["weight"]

  @property
  def inputs(self) -> int:
    return self.parts[0].shape[0]

  @property
  def outputs(self) -> int:
    return sum(part.shape[-1] for part in self.parts)

  @property
  def kind(self) -> str:
    """ "linear", "conv1d" (a matrix that lies [in, out]), "embedding" or "norm"."""
    entry = self.parts[0].entry
    if not entry.path.endswith("/kernel"):
      return "embedding" if entry.path.endswith("/embedding") else "norm"
    return "linear" if entry.transpose else "conv1d"


@dataclasses.dataclass(frozen=True)
class View:
  """A model without adapters, by the modules of its family.

  Attributes:
    given: configuration and parameters.
    config, params: the same with token table and head apart, each a module of its own.
    modules: name → module.
  """

  given: tuple[TransformerConfig, Params]
  config: TransformerConfig
  params: Params
  modules: Mapping[str, Module]

  @property
  def family(self) -> Family:
    return families.family_of(self.config)

  @property
  def tied(self) -> bool:
    """Whether token table and head are one matrix."""
    return self.given[0].tied != self.config.tied

  def base(self, slot: Slot) -> Any:
    """The parameter in a slot, an array or a `Weight`."""
    path, index = place(self.config, slot)
    leaf = trees.items(self.params)[path]
    return leaf if index is None else jax.tree.map(lambda x: x[index], leaf)

  def adapted(self, adapters: Adapters, tied: bool) -> Adapted:
    """The model with adapters; where they are unlike, layers and ends come apart.

    Args:
      tied: whether what adapts the table is for the head as well.
    """
    ends = {TABLE, HEAD} & {*adapters}
    config, params = (
      self.given if not ends or (tied and HEAD not in ends) else (self.config, self.params)
    )
    config, params = _set_apart(config, params, adapters)
    return config, attach(params, stacked(config, adapters))


def view(config: TransformerConfig, params: Params) -> View:
  """The model by modules.

  Raises:
    ValueError: when `config` names no family, or it has no place for a parameter.
  """
  family, given = families.family_of(config), (config, params)
  if config.head == "lm" and config.tied and HEAD.path in {entry.path for entry in family.rest}:
    table = weights.materialize(params["embed"]["embedding"])
    config, params = (
      dataclasses.replace(config, tied=False),
      {**params, "head": {"kernel": table.T}},
    )
  return View(given, config, params, _modules(config, params))


def place(config: TransformerConfig, slot: Slot) -> tuple[str, int | None]:
  """The path of a parameter, and its index where it is stacked."""
  if slot.layer is None:
    return slot.path, None
  segment, name, index = stack.places(config)[slot.layer]
  return f"{segment}/{name}/{slot.path}", index


def kinds_of(modules: Mapping[str, Module]) -> list[str]:
  """Names of modules, one for those of all layers: "layers.{0…29}.mlp.up_proj"."""
  layers = {module.parts[0].slot.layer for module in modules.values()} - {None}
  numbers = "{0…" + f"{len(layers) - 1}" + "}"
  generic = lambda name, module: (
    name
    if module.parts[0].slot.layer is None
    else re.sub(r"\.\d+\.", f".{numbers}.", name, count=1)
  )
  return [*dict.fromkeys(generic(name, module) for name, module in modules.items())]


def unstacked(config: TransformerConfig, adapters: Mapping[str, Weight]) -> Adapters:
  """Slot → adapter, of adapters by path, which hold those of all layers that are stacked."""
  found = {}
  for path, adapter in adapters.items():
    for index, slot in _slots(config, path):
      found[slot] = adapter if index is None else jax.tree.map(lambda x, i=index: x[i], adapter)
  return found


def stacked(config: TransformerConfig, adapters: Adapters) -> dict[str, Weight]:
  """The inverse of `unstacked`, where layers that are stacked have alike adapters."""
  groups: dict[str, dict[int | None, Weight]] = {}
  for slot, adapter in adapters.items():
    path, index = place(config, slot)
    groups.setdefault(path, {})[index] = adapter
  together = lambda *layers: jax.tree.map(lambda *x: jnp.stack(x), *layers)
  return {
    path: of[None] if None in of else together(*(of[i] for i in range(len(of))))
    for path, of in groups.items()
  }


def _set_apart(config: TransformerConfig, params: Params, adapters: Adapters) -> Adapted:
  """The same model, in which only layers with alike adapters are stacked."""
  forms = [_form(adapters, layer) for layer in range(len(config.layers))]
  stacks: dict[tuple[str, str], set] = {}
  for form, (segment, name, _) in zip(forms, stack.places(config), strict=True):
    stacks.setdefault((segment, name), set()).add(form)
  if all(len(alike) == 1 for alike in stacks.values()):
    return config, params
  kinds = list(dict.fromkeys(forms))

  def tagged(i: int, spec: LayerSpec, tree: PyTree) -> tuple[LayerSpec, PyTree]:
    tag = f"adapters {kinds.index(forms[i])}" if forms[i] else None
    return dataclasses.replace(
      spec, tag=(spec.tag, tag) if spec.tag and tag else tag or spec.tag
    ), tree

  return stack.change(config, params, tagged)


def _modules(config: TransformerConfig, params: PyTree) -> dict[str, Module]:
  """Name → module, of a model without adapters."""
  family, leaves, layers = families.family_of(config), trees.items(params), _numbers(config)
  found: dict[str, dict[str, list[Part]]] = {}
  locals_: dict[str, str] = {}
  for path, pieces in plan_tensors(family, config, params).items():
    for piece in pieces:
      slot = _slot(layers, path, piece.layer)
      shape = tuple(leaves[path].shape[len(piece.index) :])
      name, _, kind = piece.tensor.rpartition(".")
      locals_[name] = piece.entry.name.rpartition("{i}.")[2].rpartition(".")[0]
      part = Part(slot, piece.entry, piece.span, shape)
      found.setdefault(name, {}).setdefault(kind, []).append(part)
  first = lambda part: part.span or (0,)
  return {
    name: Module(
      name, locals_[name], {kind: tuple(sorted(parts, key=first)) for kind, parts in held.items()}
    )
    for name, held in found.items()
  }


def _form(adapters: Adapters, layer: int) -> tuple:
  """What has to agree where the adapters of layers are stacked."""
  of_layer = {slot.path: adapter for slot, adapter in adapters.items() if slot.layer == layer}
  shapes = lambda adapter: tuple(tuple(x.shape) for x in jax.tree.leaves(adapter))
  form = lambda adapter: (jax.tree.structure(adapter), shapes(adapter))
  return tuple((path, *form(of_layer[path])) for path in sorted(of_layer))


def _numbers(config: TransformerConfig) -> dict[str, list[tuple[int | None, int]]]:
  """Beginning of a layer's paths → (index in the stack, number) of the layers that lie there."""
  found: dict[str, list[tuple[int | None, int]]] = {}
  for number, (segment, name, index) in enumerate(stack.places(config)):
    found.setdefault(f"{segment}/{name}/", []).append((index, number))
  return found


def _slots(config: TransformerConfig, path: str) -> Iterator[tuple[int | None, Slot]]:
  """(index in the stack, slot) of each parameter that lies at `path`."""
  for start, layers in _numbers(config).items():
    if path.startswith(start):
      yield from ((index, Slot(number, path.removeprefix(start))) for index, number in layers)
      return
  yield None, Slot(None, path)


def _slot(layers: Mapping[str, list], path: str, index: int | None) -> Slot:
  for start, numbers in layers.items():
    if path.startswith(start):
      return Slot(dict(numbers)[index], path.removeprefix(start))
  return Slot(None, path)
