"""Soft prompts as peft's folders have them: one tensor [P, D], as it goes into the model."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from effjax.models.exchange.archive import Archive, Parts, Written
from effjax.models.exchange.modules import TABLE, Adapted, Adapters, View
from effjax.models.families.fields import Fields
from effjax.peft.soft_prompt import Prompted

TYPE = "PROMPT_TUNING"
WEIGHTS = (Prompted,)
DEFAULTS: dict[str, Any] = {}
# How the prompt started.
HARMLESS = {
  "prompt_tuning_init",
  "prompt_tuning_init_text",
  "tokenizer_name_or_path",
  "tokenizer_kwargs",
}
TENSOR = "prompt_embeddings"


def read(fields: Fields, archive: Archive, view: View, parts: Parts) -> Adapted:
  """The model with the prompt of a folder.

  Raises:
    ValueError: for what the folder says of another model.
  """
  width = view.base(TABLE).shape[-1]
  fields.need("modules_to_save", None, [])
  fields.need("num_transformer_submodules", 1, None)
  fields.need("token_dim", width, None)
  fields.need("num_layers", len(view.config.layers), None)
  fields.unused("num_attention_heads")
  values = archive.take(TENSOR, (fields.integer("num_virtual_tokens"), width))
  scale = jnp.full((1, 1), view.config.embed_scale, jnp.float32)
  return view.adapted({TABLE: Prompted(None, jnp.asarray(values[None]), scale)}, True)


def write(view: View, adapters: Adapters) -> Written | None:
  """What a folder has to hold; None where peft's layout cannot say it."""
  if {*adapters} != {TABLE} or len(adapters[TABLE].prompt) != 1:
    return None
  (prompt,) = np.asarray(adapters[TABLE].prompt, np.float32)
  mixer: Any = view.config.layers[0].mixer
  fields = {
    "num_virtual_tokens": len(prompt),
    "token_dim": prompt.shape[1],
    "num_layers": len(view.config.layers),
    "num_attention_heads": mixer.heads,
    "num_transformer_submodules": 1,
  }
  return Written(fields, {TENSOR: prompt})
