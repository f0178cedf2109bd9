"""Which modules the configuration of peft means by names and patterns, and names that mean some."""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from effjax.core import trees
from effjax.models.exchange.archive import CONFIG, OURS, Archive, Parts
from effjax.models.exchange.modules import Module, kinds_of
from effjax.models.families.fields import Fields

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class Rules:
  """What a configuration says of the modules that it adapts.

  Attributes:
    targets, exclude: a pattern that has to match a whole name, or names, each of a module or the
      last parts of one; None for no module.
    layers: numbers of the layers to adapt; None for all.
    lists: what may stand before the number of a layer, patterns; none for anything.
    whole: modules that are trained whole, by the ends of their names.
    parameters: parameters of modules that are no `Linear` there, by the ends of their names.
  """

  targets: str | tuple[str, ...] | None
  exclude: str | tuple[str, ...] | None = None
  layers: tuple[int, ...] | None = None
  lists: tuple[str, ...] = ()
  whole: tuple[str, ...] = ()
  parameters: tuple[str, ...] = ()

  def adapts(self, name: str, module: Module) -> bool:
    """Whether `module`, of that full name, gets an adapter."""
    if module.parameter is not None:
      return _names(self.parameters, name + module.parameter)
    inside = (rf"(^|.*\.){end}($|\..*)" for end in self.whole)
    if any(re.match(pattern, name) for pattern in inside) or _names(self.exclude, name):
      return False
    if isinstance(self.targets, str) and self.targets.lower() == ALL_LINEAR:
      return module.kind in ("linear", "conv1d") and module.local != "lm_head"
    if isinstance(self.targets, str):
      return _names(self.targets, name)
    return _names(self.targets, name) and self._in_layers(name)

  def trains(self, name: str) -> bool:
    """Whether the module of that full name is trained whole."""
    return name.endswith(self.whole)

  def _in_layers(self, name: str) -> bool:
    if not self.layers:
      return True
    before = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in self.lists] or [
      r".*?\.[^.]*\.(\d+)\."
    ]
    found = next(filter(None, (re.match(pattern, name) for pattern in before)), None)
    return found is not None and int(found[1]) in self.layers


def read_rules(fields: Fields) -> Rules:
  """The rules in the fields that all methods on modules have.

  Raises:
    ValueError: for one of another type, or a pattern that is none.
  """
  layers = fields.raw("layers_to_transform")
  layers = [layers] if type(layers) is int else layers
  if layers is not None and not (isinstance(layers, list) and all(type(i) is int for i in layers)):
    raise fields.wrong("layers_to_transform", "an integer, a list of them, null")
  exclude = read_names(fields, "exclude_modules")
  lists = read_names(fields, "layers_pattern") or ()
  return Rules(
    read_names(fields, "target_modules"),
    exclude,
    None if layers is None else tuple(layers),
    (lists,) if isinstance(lists, str) else lists,
    tuple(fields.items("modules_to_save", (str,)) or ()),
    tuple(fields.items("target_parameters", (str,)) or ()) if "target_parameters" in fields else (),
  )


def check_adapted(
  archive: Archive,
  rules: Rules,
  modules: Mapping[str, Module],
  adapted: Collection[str],
  parts: Parts,
) -> None:
  """Refuses a file that adapts other modules, full names, than is said of it.

  Raises:
    ValueError: where its configuration says so, or our own file of parts of modules.
  """
  meant = {name for name, module in modules.items() if rules.adapts(name, module)}
  if not meant:
    raise ValueError(
      f"{archive.path}: target_modules={rules.targets!r} matches nothing in this model; allowed: "
      f"{trees.some(kinds_of(modules))}"
    )
  if missing := sorted(meant - {*adapted}):
    raise ValueError(f"{archive.path}: no tensors for {trees.some(missing)}, as {CONFIG} says")
  if more := sorted({*adapted} - meant):
    raise ValueError(
      f"{archive.path}: tensors for {trees.some(more)}, which by {CONFIG} are not adapted"
    )
  paths = {name: {part.slot.path for part in modules[name].parts} for name in adapted}
  for name, blocks in parts.items():
    if not blocks or {block[0] for block in blocks} - paths.get(name, set()):
      raise ValueError(
        f"{archive.path}: {OURS} has {blocks} of {name!r}; allowed: some of "
        f"{sorted(paths.get(name, ()))}"
      )


def check_parameters(fields: Fields, rules: Rules, modules: Mapping[str, Module]) -> None:
  """Refuses parameters that this model has not, or has as a `Linear`.

  Raises:
    ValueError: naming those that there are.
  """
  there = {name + m.parameter: m for name, m in modules.items() if m.parameter is not None}
  for target in rules.parameters:
    if not any(_names((target,), name) for name in there):
      raise fields.wrong("target_parameters", trees.some(kinds_of(there)) if there else "none")


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
  """The value of the first pattern that the last parts of a full name match, or the default."""
  for pattern, value in patterns.items():
    if re.match(rf"(.*\.)?({pattern})$", name):
      return value
  return default


def read_names(fields: Fields, name: str) -> Any:
  """A field that is a pattern, a tuple of names, or None."""
  value = fields.raw(name)
  if isinstance(value, list) and all(isinstance(item, str) for item in value):
    return tuple(value)
  if value is not None and not isinstance(value, str):
    raise fields.wrong(name, "a pattern, a list of names, null")
  if value is not None:
    _check_patterns(fields, name, [value])
  return value


def read_patterns(fields: Fields, name: str, kinds: tuple[type, ...]) -> dict[str, Any]:
  """Pattern → positive number, a field of such."""
  values = fields.raw(name) or {}
  if not isinstance(values, dict) or not all(type(x) in kinds and x > 0 for x in values.values()):
    raise fields.wrong(name, "an object of positive numbers by pattern")
  _check_patterns(fields, name, values)
  return values


def shortest(chosen: Iterable[str], modules: Mapping[str, Module]) -> list[str]:
  """Names that by their ends mean the modules of `chosen`, full names → modules, and no other.

  One name stands for the same module of all layers where it means no module besides.
  """
  names = [*chosen]
  found: dict[str, None] = {}
  for name in names:
    local = modules[name].local
    meant = {other for other in modules if other.endswith(local)}
    found[(local if meant <= {*names} else name) + (modules[name].parameter or "")] = None
  return list(found)


def by_pattern(values: Mapping[str, Any], modules: Mapping[str, Module], default: Any) -> dict:
  """Pattern → value of the modules, full name → value, that have another than the default."""
  found = {}
  for name, value in values.items():
    if value == default:
      continue
    local = modules[name].local
    alike = all(x == value for other, x in values.items() if other.endswith(local))
    found[(local if alike else name) + (modules[name].parameter or "")] = value
  return found


def _names(names: str | Iterable[str] | None, name: str) -> bool:
  if isinstance(names, str):
    return re.fullmatch(names, name) is not None
  return any(name == other or name.endswith(f".{other}") for other in names or ())


def _check_patterns(fields: Fields, name: str, patterns: Iterable[str]) -> None:
  for pattern in patterns:
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(f"{fields.where}: {name}: {pattern!r} is no pattern: {error}") from error
