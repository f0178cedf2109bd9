"""IA³ as peft's folders have it: a vector for each module, of its outputs or its inputs.

Where a module holds several of our parameters side by side, its outputs are theirs, and those of a
parameter without a vector are multiplied by 1; our own file says which have one. Inputs
are multiplied for all of them.
"""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from effjax.models.exchange import choosing, naming, whole
from effjax.models.exchange.archive import PREFIX, Archive, Parts, Written
from effjax.models.exchange.modules import Adapted, Adapters, Module, Part, View
from effjax.models.families.fields import Fields
from effjax.peft.ia3 import IA3

TYPE = "IA3"
WEIGHTS = (IA3,)
DEFAULTS: dict[str, Any] = {"feedforward_modules": None}
HARMLESS = {"init_ia3_weights", "fan_in_fan_out"}  # a module is known to hold its matrix either way
VECTOR = "ia3_l"


def read(fields: Fields, archive: Archive, view: View, parts: Parts) -> Adapted:
  """The model with the vectors of a folder.

  Raises:
    ValueError: for what the folder says or lacks, and what is of another shape.
  """
  rules = choosing.read_rules(fields)
  feedforward = choosing.read_names(fields, "feedforward_modules")
  if feedforward is None:
    raise fields.wrong("feedforward_modules", "a pattern, a list of names")
  modules, tensors = naming.tensors_of(
    view.family, view.modules, archive, (VECTOR, *whole.ENDINGS), rules
  )
  adapted = {name for name, there in tensors.items() if VECTOR in there}
  choosing.check_adapted(archive, rules, modules, adapted, parts)
  found: Adapters = {}
  for name in sorted(adapted):
    module, of_inputs = modules[name], _is_feedforward(feedforward, name)
    shape = (1, module.inputs) if of_inputs else (module.outputs, 1)
    vector = archive.take(f"{PREFIX}{name}.{VECTOR}", shape)
    having = {path for path, *_ in parts.get(name, [])}
    chosen = [part for part in module.parts if not having or part.slot.path in having]
    found |= {part.slot: _ia3(vector, part, of_inputs) for part in chosen}
  found |= whole.read(archive, rules, "none", modules, tensors, adapted, view.base)
  return view.adapted(found, False)


def write(view: View, adapters: Adapters) -> Written | None:
  """What a folder has to hold; None where peft's layout cannot say it."""
  modules = naming.named(view.family, view.modules)
  given = {name: _given(module, adapters) for name, module in modules.items()}
  every = {name: _gathered(modules[name], parts) for name, parts in given.items() if parts}
  vectors = {name: vector for name, vector in every.items() if vector is not None}
  beside = whole.write(adapters, modules, set(vectors))
  if not every or len(vectors) < len(every) or beside is None or "bias" in beside.fields:
    return None
  inputs = [name for name, vector in vectors.items() if len(vector) == 1]
  outputs = [name for name in vectors if name not in inputs]
  feedforward = choosing.shortest(inputs, modules)
  fields = {
    "target_modules": choosing.shortest(outputs, modules) + feedforward,
    "feedforward_modules": feedforward,
    "fan_in_fan_out": any(modules[name].kind == "conv1d" for name in vectors),
  }
  tensors = {f"{PREFIX}{name}.{VECTOR}": vector for name, vector in vectors.items()}
  some = {name for name in vectors if len(given[name]) < len(modules[name].parts)}
  parts = {name: [[part.slot.path] for part, _ in given[name]] for name in some}
  return Written({**fields, **beside.fields}, {**tensors, **beside.tensors}, parts)


def _given(module: Module, adapters: Adapters) -> list[tuple[Part, IA3]]:
  """The parts of a module that have a vector, and it."""
  found = [(part, adapters.get(part.slot)) for part in module.parts]
  return [(part, w) for part, w in found if isinstance(w, IA3)]


def _gathered(module: Module, given: list[tuple[Part, IA3]]) -> np.ndarray | None:
  """The vector of a module, [1, in] or [out, 1]; None where there is none for all of it."""
  vectors = {part.slot: np.asarray(w.scale, np.float32) for part, w in given}
  of_inputs = {x.shape == (module.inputs, 1) for x in vectors.values()}
  if module.kind == "embedding" or module.parameter is not None or len(of_inputs) > 1:
    return None
  if of_inputs == {False}:
    ones = lambda part: np.ones((1, part.shape[-1]), np.float32)
    return np.concatenate([vectors.get(part.slot, ones(part)) for part in module.parts], axis=1).T
  first, *others = vectors.values()
  alike = all(np.array_equal(first, other) for other in others)
  return first.T if alike and len(vectors) == len(module.parts) else None


def _ia3(vector: np.ndarray, part: Part, of_inputs: bool) -> IA3:
  columns = slice(None) if part.span is None else slice(*part.span[:2])
  return IA3(None, jnp.asarray(vector.T if of_inputs else vector[columns].T))


def _is_feedforward(names: str | tuple[str, ...], name: str) -> bool:
  """Whether inputs are multiplied, as peft tells by patterns and ends of names."""
  return bool(re.fullmatch(names, name)) if isinstance(names, str) else name.endswith(names)
