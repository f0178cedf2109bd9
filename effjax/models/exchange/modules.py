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
from effjax.models.exchange.homes import Home, home_of
from effjax.models.families.table import EXPERT, Entry, Family, Span
from effjax.models.layout import plan_tensors
from effjax.peft.detached import attach


@dataclasses.dataclass(frozen=True)
class Slot:
  """A parameter: the number of its layer, or None outside the layers, and its path from there.

  Attributes:
    expert: of which expert it is, where the parameter holds those of all.
  """

  layer: int | None
  path: str
  expert: int | None = None


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
    experts: how many matrices it has, one for each expert, or None.
    parameter: what follows its name in that of the parameter that peft adapts, where there is no
      `Linear`; None where there is one.
  """

  name: str
  local: str
  tensors: Mapping[str, tuple[Part, ...]]
  experts: int | None = None
  parameter: str | None = None

  def one(self, expert: int | None) -> "Module":
    """The module of one of the experts."""
    own = lambda parts: tuple(part for part in parts if part.slot.expert == expert)
    tensors = {kind: own(parts) for kind, parts in self.tensors.items()}
    return dataclasses.replace(self, tensors=tensors, experts=None)

  @property
  def parts(self) -> tuple[Part, ...]:
    return self.tensors["weight"]

  @property
  def inputs(self) -> int:
    return self.parts[0].shape[0]

  @property
  def outputs(self) -> int:
    return sum(part.shape[-1] for part in self.parts) // (self.experts or 1)

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
    return _at(trees.items(self.params)[path], index)

  @property
  def one_by_one(self) -> Mapping[str, Module]:
    """The modules, each expert's its own, as files of transformers 4 name them."""
    return _modules(self.config, self.params, stacks=False)

  def adapted(self, adapters: Adapters, tied: bool) -> Adapted:
    """The model with adapters; where they are unlike, layers and ends come apart.

    Args:
      tied: whether what adapts the table is for the head as well.

    Raises:
      ValueError: where some experts of a layer have no adapters, or others.
    """
    ends = {TABLE, HEAD} & {*adapters}
    config, params = (
      self.given if not ends or (tied and HEAD not in ends) else (self.config, self.params)
    )
    _check_experts(config, params, adapters)
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
  return View(given, config, params, _modules(config, params, stacks=True))


def place(config: TransformerConfig, slot: Slot) -> tuple[str, tuple[int, ...]]:
  """The path of a parameter, and its index where it is stacked."""
  if slot.layer is None:
    return slot.path, ()
  segment, name, index = stack.places(config)[slot.layer]
  numbers = (number for number in (index, slot.expert) if number is not None)
  return f"{segment}/{name}/{slot.path}", tuple(numbers)


def kinds_of(modules: Mapping[str, Module]) -> list[str]:
  """Names of modules, one for those of all layers: "layers.{0…29}.mlp.up_proj"."""
  layers = {module.parts[0].slot.layer for module in modules.values()} - {None}
  numbers = "{0…" + f"{len(layers) - 1}" + "}"
  generic = lambda name, module: (
    name
    if module.parts[0].slot.layer is None
    else re.sub(r"\.\d+\.", f".{numbers}.", re.sub(r"(experts)\.\d+", r"\1.{…}", name), count=1)
  )
  return [*dict.fromkeys(generic(name, module) for name, module in modules.items())]


def unstacked(config: TransformerConfig, adapters: Mapping[str, Weight]) -> Adapters:
  """Slot → adapter, of adapters by path, which hold those of stacked layers and experts."""
  entries = families.family_of(config).layer
  of_experts = {entry.path for entry in entries if EXPERT in entry.name}
  found = {}
  for path, adapter in adapters.items():
    for index, slot in _slots(config, path):
      own = _at(adapter, () if index is None else (index,))
      if slot.path not in of_experts:
        found[slot] = own
        continue
      for e in range(len(jax.tree.leaves(own)[0])):
        found[dataclasses.replace(slot, expert=e)] = _at(own, (e,))
  return found


def stacked(config: TransformerConfig, adapters: Adapters) -> dict[str, Weight]:
  """The inverse of `unstacked`, where layers and experts that are stacked have alike adapters."""
  groups: dict[str, dict[tuple[int, ...], Weight]] = {}
  for slot, adapter in adapters.items():
    path, index = place(config, slot)
    groups.setdefault(path, {})[index] = adapter
  return {path: _together(of) for path, of in groups.items()}


def _together(of: Mapping[tuple[int, ...], Weight]) -> Weight:
  """One weight of those by their index along the leading axes."""
  if () in of:
    return of[()]
  inner: dict[int, dict[tuple[int, ...], Weight]] = {}
  for (first, *rest), weight in of.items():
    inner.setdefault(first, {})[tuple(rest)] = weight
  return jax.tree.map(lambda *x: jnp.stack(x), *(_together(inner[i]) for i in sorted(inner)))


def _at(tree: PyTree, index: tuple[int, ...]) -> Any:
  """What of each array lies at an index of its leading axes."""
  return jax.tree.map(lambda x: x[index], tree) if index else tree


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


def _check_experts(config: TransformerConfig, params: Params, adapters: Adapters) -> None:
  """Raises ValueError where the experts of a layer, which are stacked, have unlike adapters."""
  leaves = trees.items(params)
  groups: dict[Slot, dict[int, Any]] = {}
  for slot, adapter in adapters.items():
    if slot.expert is not None:
      groups.setdefault(dataclasses.replace(slot, expert=None), {})[slot.expert] = adapter
  for slot, of in groups.items():
    path, index = place(config, slot)
    count, forms = leaves[path].shape[len(index)], {_shapes(adapter) for adapter in of.values()}
    if len(of) < count or len(forms) > 1:
      raise ValueError(
        f"layer {slot.layer}: {slot.path}: adapters of experts {sorted(of)}, of {len(forms)} "
        f"kinds; allowed: all {count} of one kind and rank"
      )


def _modules(config: TransformerConfig, params: PyTree, *, stacks: bool) -> dict[str, Module]:
  """Name → module, of a model without adapters; `stacks` as transformers 5 has experts."""
  family, leaves, layers = families.family_of(config), trees.items(params), _numbers(config)
  found: dict[str, dict[str, list[Part]]] = {}
  homes: dict[str, Home] = {}
  for path, pieces in plan_tensors(family, config, params).items():
    for piece in pieces:
      slot = dataclasses.replace(_slot(layers, path, piece.layer), expert=piece.expert)
      shape = tuple(leaves[path].shape[len(piece.index) :])
      home = home_of(family, piece, shape[-1], stacks=stacks)
      homes[home.name] = home
      part = Part(slot, piece.entry, home.span, shape)
      found.setdefault(home.name, {}).setdefault(home.kind, []).append(part)
  return {name: _module(homes[name], held) for name, held in found.items()}


def _module(home: Home, held: Mapping[str, list[Part]]) -> Module:
  first = lambda part: (part.slot.expert or 0, part.span or (0,))
  tensors = {kind: tuple(sorted(parts, key=first)) for kind, parts in held.items()}
  experts = {part.slot.expert for part in tensors.get("weight", ())}
  count = len(experts) if home.is_stack else None
  return Module(home.name, home.local, tensors, count, home.parameter)


def _form(adapters: Adapters, layer: int) -> tuple:
  """What has to agree where the adapters of layers are stacked."""
  of_layer = {slot.path: adapter for slot, adapter in adapters.items() if slot.layer == layer}
  return tuple((path, *_shapes(of_layer[path])) for path in sorted(of_layer))


def _shapes(adapter: PyTree) -> tuple:
  return jax.tree.structure(adapter), tuple(tuple(x.shape) for x in jax.tree.leaves(adapter))


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
