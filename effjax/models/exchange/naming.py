"""The modules of a model under the names that a file has for them."""

import re
from collections.abc import Iterable, Mapping

from effjax.core import trees
from effjax.models.exchange.archive import Archive, endings
from effjax.models.exchange.choosing import Rules
from effjax.models.exchange.modules import Module, kinds_of
from effjax.models.families.table import Family


def named(family: Family, modules: Mapping[str, Module], prefix: str | None = None) -> dict:
  """Full name → module, with what stands before the names of a model of another head."""
  prefix = family.prefixes[0] if prefix is None else prefix
  bare = lambda name: f"{name}.".startswith(family.unprefixed)
  return {name if bare(name) else prefix + name: module for name, module in modules.items()}


def prefix_of(family: Family, archive: Archive, names: Iterable[str]) -> str | None:
  """What stands before the names of modules in a file; None where no name says.

  Raises:
    ValueError: for more than one.
  """
  found = set()
  for name in names:
    if not f"{name}.".startswith(family.unprefixed):
      found.add(max(filter(name.startswith, family.prefixes), key=len, default=""))
  if len(found) > 1:
    raise ValueError(f"{archive.path}: names begin with {sorted(found)}; allowed: one of them")
  return found.pop() if found else None


def tensors_of(
  family: Family,
  modules: Mapping[str, Module],
  archive: Archive,
  known: tuple[str, ...],
  rules: Rules,
) -> tuple[dict[str, Module], dict[str, dict[str, str]]]:
  """The modules of a model by their full names, and name → {ending: tensor} of those it adapts.

  Tensors of modules whose output a model does not compute, such as BERT's pooler, are passed over.

  Raises:
    ValueError: for a module that the model has not.
  """
  tensors = [*endings(archive, known)]
  whole = named(family, modules, prefix_of(family, archive, (name for _, name, _ in tensors)))
  found: dict[str, dict[str, str]] = {}
  chosen = (name for name, m in whole.items() if m.experts is not None and rules.adapts(name, m))
  stacks = {theirs: name for name, theirs in wrapped(whole, chosen).items()}
  for tensor, name, ending in tensors:
    name = stacks.get(name, name)
    if name in whole:
      found.setdefault(name, {})[ending] = tensor
    elif _unused(family, name):
      archive.skip(tensor)
    else:
      raise ValueError(
        f"{archive.path}: adapts module {name!r}, which this model of family {family.name!r} has "
        f"not; allowed: {trees.some(kinds_of(whole))}"
      )
  return whole, found


def wrapped(modules: Mapping[str, Module], adapted: Iterable[str]) -> dict[str, str]:
  """Full name of a stack of experts that is adapted → what a file calls it.

  Where peft adapts several parameters of a module, it wraps one around another: the names of the
  first have "base_layer" in them for each that follows.
  """
  inside: dict[str, list[str]] = {}
  for name in sorted({*adapted}, key=[*modules].index):
    inside.setdefault(name.rpartition(".")[0], []).append(name)
  return {
    name: ".".join([home, *["base_layer"] * depth])
    for home, names in inside.items()
    for depth, name in enumerate(reversed(names))
  }


def _canonical(family: Family, name: str) -> str:
  return family.canonical(f"{name}.weight").removesuffix(".weight")


def _unused(family: Family, name: str) -> bool:
  return any(re.fullmatch(rule, f"{_canonical(family, name)}.weight") for rule in family.ignored)
