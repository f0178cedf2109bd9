"""A model's adapters in the folders of Hugging Face's peft, both ways.

`effjax.peft.save` and `load` do this where they are given a `Model`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import trees
from effjax.core.typing import Params
from effjax.core.weights import Weight
from effjax.layers.spec import TransformerConfig
from effjax.models.exchange import archive, ia3, lora, prefix, soft_prompt
from effjax.models.exchange.archive import CONFIG, OURS, TENSORS, Archive, Written
from effjax.models.exchange.modules import unstacked, view
from effjax.models.families.fields import Fields
from effjax.models.folders import Folder
from effjax.models.model import Model
from effjax.peft import files
from effjax.peft.beside import Tuned, is_adapter
from effjax.peft.detached import attach, detach

METHODS = {method.TYPE: method for method in (lora, ia3, prefix, soft_prompt)}
# Fields of all methods, and those that change nothing of what is computed.
DEFAULTS: dict[str, Any] = dict.fromkeys(
  (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
  )
)
COMMON = {"base_model_name_or_path": None, "inference_mode": True}
HARMLESS = {
  "auto_mapping",
  "peft_version",
  "base_model_name_or_path",
  "revision",
  "task_type",
  "inference_mode",
}


@files.save.register
def save(model: Model, folder: str | Path) -> Path:
  """Writes what adapts `model`: as peft does where it can hold that, else as `peft.save`.

  Raises:
    ValueError: when nothing adapts it.
    FileExistsError: when there is such a file already.
    OSError: when it cannot be written.
  """
  folder, (base, adapters) = Path(folder), detach(model.params)
  method, written = _written(model.config, base, adapters)
  for name in (CONFIG, TENSORS, files.FILE):
    if (folder / name).exists():
      raise FileExistsError(f"{folder / name}: is there already; allowed: a folder without")
  digests = trees.digests(base)
  if written is None:
    path = files.save(model.params, folder)
    (folder / OURS).write_text(archive.ours(digests, {}))
    return path
  task = "CAUSAL_LM" if model.config.head == "lm" else "FEATURE_EXTRACTION"
  fields = {**COMMON, "peft_type": method, "task_type": task, **written.fields}
  return archive.write(folder, written._replace(fields=fields), digests)


@files.load.register
def load(model: Model, folder: str | Path) -> Model:
  """`model` with the adapters of a folder of peft, or of one that `save` wrote.

  Raises:
    FileNotFoundError: when there is none.
    ValueError: when it is damaged, says something that is not done here, or is for another model,
      and for a model that has adapters.
  """
  if any(is_adapter(leaf) for leaf in trees.items(model.params).values()):
    raise ValueError("model has adapters; allowed: one without, as peft.detach gives its params")
  there = Folder(folder)
  base, parts = archive.read_ours(there)
  _check_base(model.params, base, str(there.file(OURS)))
  if not there.has(CONFIG):
    adapters = files.read(folder)
    _check_places(model, adapters, folder)
    return dataclasses.replace(model, params=attach(model.params, adapters))
  values, where = there.json(CONFIG), str(there.file(CONFIG))
  method = METHODS[Fields(where, values).choice("peft_type", METHODS)]
  fields, tensors = Fields(where, values, DEFAULTS | method.DEFAULTS), Archive(there)
  config, params = method.read(fields, tensors, view(model.config, model.params), parts)
  fields.unused("peft_type", *HARMLESS, *method.HARMLESS)
  fields.finish(())
  tensors.finish()
  module = model.module.copy(config=config)
  return dataclasses.replace(model, config=config, params=params, module=module)


def _written(
  config: TransformerConfig, params: Params, adapters: Mapping[str, Weight]
) -> tuple[str, Written | None]:
  """A method of peft and what its folder holds of adapters by path; None where none can hold it."""
  try:
    seen, slots = view(config, params), unstacked(config, adapters)
  except ValueError:  # a model that no family has
    return "", None
  for name, method in METHODS.items():
    kinds = (*method.WEIGHTS, Tuned)
    if all(isinstance(w, kinds) and w.base is None for w in adapters.values()):
      written = method.write(seen, slots)
      if written is not None:
        return name, written
  return "", None


def _check_base(params: Params, base: Mapping[str, str], where: str) -> None:
  """Raises ValueError where a parameter is of the same type and shape as then, and another."""
  digests = trees.digests(
    {path: leaf for path, leaf in trees.items(params).items() if path in base}
  )
  for path, digest in digests.items():
    then, now = (text.rsplit(" ", 1) for text in (base[path], digest))
    if then[0] == now[0] and then != now:
      raise ValueError(
        f"{where}: adapts a model whose {path!r} has other values than this one; allowed: that "
        f"model, or a folder without {OURS}"
      )


def _check_places(model: Model, adapters: Mapping[str, Weight], folder: str | Path) -> None:
  """Raises ValueError where the configuration wants other parameters than are there then."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  wanted = jax.eval_shape(model.module.init, jax.random.key(0), tokens)["params"]
  if wrong := {*trees.items(model.params), *adapters} ^ {*trees.items(wanted)}:
    raise ValueError(
      f"{folder}: model.config has no place for, or lacks, {trees.some(sorted(wrong))}; allowed: "
      "the configuration of the model that was saved, as the add of adapters, experts, prefix "
      "gives it, and of its parameters what peft.detach leaves"
    )
