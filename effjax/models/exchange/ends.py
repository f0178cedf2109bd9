"""Both ends of a model, whose token table and head are one matrix in ours where they are tied.

In peft each end has an adapter of its own, and `ensure_weight_tying` says that the head's is the
table's, transposed.
"""

from collections.abc import Mapping

import numpy as np

from effjax.models.exchange.archive import PREFIX, Archive, Written
from effjax.models.exchange.modules import HEAD, TABLE, Adapters, Module, Slot
from effjax.peft.adapter import Tuned

# What the head has → what the table has, and whether the one is the other transposed.
ALIKE = {
  "lora_A.weight": ("lora_embedding_B", True),
  "lora_B.weight": ("lora_embedding_A", True),
  "weight": ("weight", False),
  "base_layer.weight": ("base_layer.weight", False),
}


def name_of(slot: Slot, modules: Mapping[str, Module]) -> str | None:
  """The full name of the module that an end is; None where there is none."""
  return next((name for name, m in modules.items() if m.parts[0].slot == slot), None)


def take_tied(
  archive: Archive, modules: dict[str, Module], tensors: dict[str, dict[str, str]]
) -> bool:
  """Whether the head has what the table has; it is taken out of `modules` and `tensors` then.

  Raises:
    ValueError: where it has something else.
  """
  table, head = name_of(TABLE, modules), name_of(HEAD, modules)
  there = tensors.pop(head, {}) if head else {}
  if head is None or not there:
    return False
  for ending, tensor in there.items():
    other, transposed = ALIKE.get(ending, (None, False))
    same = tensors.get(table or "", {}).get(other or "")
    ours = None if same is None else archive.take(same, (None, None))
    theirs = archive.take(tensor, (None, None))
    if ours is None or not np.array_equal(theirs.T if transposed else theirs, ours):
      raise ValueError(
        f"{archive.path}: ensure_weight_tying, and tensor {tensor!r} is not what {table!r} has; "
        "allowed: the same for both ends"
      )
  del modules[head]
  return True


def tie(written: Written, adapters: Adapters, modules: Mapping[str, Module]) -> Written | None:
  """`written` for a tied model: where its table is adapted, the head is too; None if it cannot."""
  table, head = name_of(TABLE, modules), name_of(HEAD, modules)
  if TABLE not in adapters or head is None:
    return written
  start = f"{PREFIX}{table}."
  own = {key.removeprefix(start): x for key, x in written.tensors.items() if key.startswith(start)}
  repeated = {
    f"{PREFIX}{head}.{ending}": own[other].T if transposed else own[other]
    for ending, (other, transposed) in ALIKE.items()
    if other in own
  }
  if len(repeated) < len(own):
    return None
  field = "modules_to_save" if isinstance(adapters[TABLE], Tuned) else "target_modules"
  fields = {"ensure_weight_tying": True, field: [*written.fields[field], head]}
  return Written({**written.fields, **fields}, {**written.tensors, **repeated}, written.parts)
