"""A model's adapters in the folders of Hugging Face's peft, both ways.

`effjax.peft.save` and `load` do this where they are given a `Model`.
"""

import dataclasses
from pathlib import Path
from typing import Any

from effjax import peft
from effjax.core import trees
from effjax.models import families
from effjax.models.exchange import archive, lora
from effjax.models.exchange.archive import CONFIG, OURS, TENSORS, Archive
from effjax.models.exchange.modules import unstacked, view
from effjax.models.families.fields import Fields
from effjax.models.folders import Folder
from effjax.models.model import Model
from effjax.peft import files
from effjax.peft.adapter import Tuned, is_adapter

METHODS = {method.TYPE: method for method in (lora,)}
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


@peft.save.register
def save(model: Model, folder: str | Path) -> Path:
  """Writes what adapts `model`: as peft does where its layout can hold it, else as `peft.save`."""
  base, adapters = peft.detach(model.params)
  written = _written(model.config, base, adapters)
  if written is None:
    return peft.save(model.params, folder)
  for name in (CONFIG, TENSORS, files.FILE):
    if (Path(folder) / name).exists():
      raise FileExistsError(f"{Path(folder) / name}: is there already; allowed: a folder without")
  task = "CAUSAL_LM" if model.config.head == "lm" else "FEATURE_EXTRACTION"
  return archive.write(
    Path(folder), written._replace(fields=COMMON | {"task_type": task} | written.fields)
  )


def _written(config, params, adapters):
  """What a folder of peft holds of adapters by path; None where it has no way to say it."""
  if config.family not in families.FAMILIES:
    return None
  for method in METHODS.values():
    if all(
      isinstance(adapter, (*method.WEIGHTS, Tuned)) and adapter.base is None
      for adapter in adapters.values()
    ):
      written = method.write(view(config, params), unstacked(config, adapters))
      if written:
        return written._replace(fields={"peft_type": method.TYPE} | written.fields)
  return None


@peft.load.register
def load(model: Model, folder: str | Path) -> Model:
  """`model` with the adapters of a folder of peft, or of one that `save` wrote."""
  if any(is_adapter(leaf) for leaf in trees.items(model.params).values()):
    raise ValueError("model has adapters; allowed: one without, as peft.detach gives its params")
  files_ = Folder(folder)
  if not files_.has(CONFIG):
    return dataclasses.replace(model, params=peft.load(model.params, folder))
  values, where = files_.json(CONFIG), str(files_.file(CONFIG))
  kind = Fields(where, values).choice("peft_type", METHODS)
  method = METHODS[kind]
  fields = Fields(where, values, DEFAULTS | method.DEFAULTS)
  fields.unused("peft_type")
  ours = files_.json(OURS) if files_.has(OURS) else {}
  tensors = Archive(files_)
  config, params = method.read(fields, tensors, view(model.config, model.params), ours)
  fields.finish(HARMLESS | method.HARMLESS)
  tensors.finish()
  return dataclasses.replace(
    model, config=config, params=params, module=model.module.copy(config=config)
  )
