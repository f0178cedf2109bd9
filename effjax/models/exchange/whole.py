"""Parameters trained whole beside adapters: peft's `modules_to_save` and `bias`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from effjax.core import weights
from effjax.models.exchange import choosing
from effjax.models.exchange.archive import CONFIG, NOTHING, PREFIX, Archive, Written
from effjax.models.exchange.choosing import Rules
from effjax.models.exchange.modules import Adapters, Module, Part, Slot
from effjax.peft.beside import Tuned

ROUNDING = 2.0**-7  # of bfloat16: a table may be kept in it here, or there
KINDS = ("weight", "bias")
ENDINGS = ("base_layer.weight", "base_layer.bias", "weight", "bias")


def read(
  archive: Archive,
  rules: Rules,
  bias: str,
  modules: Mapping[str, Module],
  tensors: Mapping[str, Mapping[str, str]],
  adapted: set[str],
  base: Callable[[Slot], Any],
) -> Adapters:
  """The parameters that a file has whole.

  A table that a file repeats because it is adapted has to be that of the model.

  Args:
    bias: "none", "all" or "lora_only": whose biases are trained.
    modules: full name → module.
    tensors: full name → {ending: tensor}.
    adapted: full names of the modules with adapters.
    base: slot → parameter.

  Raises:
    ValueError: for what is missing, of another shape, or a table unlike the model's.
  """
  found: Adapters = {}
  for name, module in modules.items():
    there = tensors.get(name, {})
    wanted = set(module.tensors) if rules.trains(name) and name not in adapted else set()
    if bias == "all" or (bias == "lora_only" and name in adapted):
      wanted |= {"bias"} & set(module.tensors)
    for kind in wanted:
      tensor = there.get(f"base_layer.{kind}", there.get(kind))
      if tensor is None:
        raise ValueError(f"{archive.path}: no {kind} of {name!r}, which {CONFIG} says is trained")
      found |= _tuned(archive, tensor, module.tensors[kind], base)
    for ending in {"base_layer.weight", "weight"} & set(there) - wanted:
      if module.kind == "embedding" or module.local == "lm_head":
        _check_same(archive, there[ending], module.parts[0], base)
  return found


def write(adapters: Adapters, modules: Mapping[str, Module], adapted: set[str]) -> Written | None:
  """Fields and tensors of the parameters trained whole; None where peft has no way to say it.

  Args:
    adapters: by slot, those trained whole among them.
    modules: full name → module.
    adapted: full names of the modules with adapters.
  """
  tuned = {slot: w.value for slot, w in adapters.items() if isinstance(w, Tuned)}
  if not tuned:
    return NOTHING
  having = {name for name, module in modules.items() if "bias" in module.tensors}
  for bias, names in (("all", having), ("lora_only", having & adapted)):
    if _slots(names, ("bias",), modules) == set(tuned):
      ends = {name: "base_layer.bias" if name in adapted else "bias" for name in names}
      keys = {f"{PREFIX}{name}.{end}": name for name, end in ends.items()}
      biases = {key: _joined(modules[name].tensors["bias"], tuned) for key, name in keys.items()}
      return Written({"bias": bias}, biases)
  single = (name for name, module in modules.items() if module.experts is None)
  saved = {name for name in single if _slots((name,), KINDS, modules) <= set(tuned)}
  if saved & adapted or _slots(saved, KINDS, modules) != set(tuned):
    return None
  tensors = {
    f"{PREFIX}{name}.{kind}": _joined(parts, tuned)
    for name in saved
    for kind, parts in modules[name].tensors.items()
  }
  return Written({"modules_to_save": choosing.shortest(sorted(saved), modules)}, tensors)


def _slots(
  names: Iterable[str], kinds: tuple[str, ...], modules: Mapping[str, Module]
) -> set[Slot]:
  """Of all parameters in the tensors of some modules."""
  tensors = [modules[name].tensors.get(kind, ()) for name in names for kind in kinds]
  return {part.slot for parts in tensors for part in parts}


def _tuned(archive: Archive, tensor: str, parts: tuple[Part, ...], base: Any) -> Adapters:
  found: Adapters = {}
  for part in parts:
    leaf = base(part.slot)
    tensor_shape = part.entry.tensor_shape(part.shape, part.span)
    value = part.entry.part(archive.take(tensor, tensor_shape), part.span)
    found[part.slot] = Tuned(None, jnp.asarray(value, leaf.dtype), new=False)
  return found


def _check_same(archive: Archive, tensor: str, part: Part, base: Any) -> None:
  """Raises ValueError where a table is not that of the model."""
  theirs = archive.take(tensor, part.entry.tensor_shape(part.shape))
  leaf = base(part.slot)
  if weights.is_weight(leaf):
    return
  ours = part.entry.unload(np.asarray(leaf, np.float32))
  if not np.allclose(ours, theirs, rtol=ROUNDING, atol=1e-6):
    raise ValueError(
      f"{archive.path}: tensor {tensor!r} is not what this model has there: the folder is of "
      "another model, or of one with other tokens"
    )


def _joined(parts: tuple[Part, ...], tuned: Mapping) -> np.ndarray:
  """The tensor of the parameters that lie side by side in it."""
  values = [np.asarray(tuned[part.slot], np.float32) for part in parts]
  return parts[0].entry.unload(np.concatenate(values, axis=-1) if len(values) > 1 else values[0])
