"""Prefixes as peft's folders have them: one tensor [P, L·2·K·H] of P virtual tokens.

For each of L layers it holds the keys of K heads of width H, and then the values, neither of them
rotated; tokens stand at P, P + 1, …, as `prefix.add` has it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import trees
from effjax.layers.spec import TransformerConfig
from effjax.models.exchange.archive import Archive, Parts, Written
from effjax.models.exchange.modules import Adapted, Adapters, Slot, View, stacked
from effjax.models.families.fields import Fields
from effjax.peft import prefix
from effjax.peft.adapter import Tuned

TYPE = "PREFIX_TUNING"
WEIGHTS = (Tuned,)
DEFAULTS: dict[str, Any] = {}
# The tensor holds what the projection gave.
HARMLESS = {"prefix_projection", "encoder_hidden_size", "init_weights"}
TENSOR = "prompt_embeddings"
PATHS = ("mixer/prefix_key", "mixer/prefix_value")


def read(fields: Fields, archive: Archive, view: View, parts: Parts) -> Adapted:
  """The model with the prefix of a folder.

  Raises:
    ValueError: for what the folder says of another model, and for a model that has no such prefix.
  """
  (config, params), length = view.given, fields.integer("num_virtual_tokens")
  heads, width = _kv_shape(config)
  fields.need("modules_to_save", None, [])
  for name, wanted in _sizes(config).items():
    fields.need(name, wanted, None)
  values = archive.take(TENSOR, (length, len(config.layers) * 2 * heads * width))
  values = values.reshape(length, len(config.layers), 2, heads, width)
  found = {
    Slot(layer, path): Tuned(None, jnp.asarray(values[:, layer, which]))
    for layer in range(len(config.layers))
    for which, path in enumerate(PATHS)
  }
  config, params = prefix.add(
    config, params, jax.random.key(0), length=length, bidirectional=True, shift=True
  )
  placed = stacked(config, found)
  return config, trees.update(params, lambda path, _: path in placed, lambda path, _: placed[path])


def write(view: View, adapters: Adapters) -> Written | None:
  """What a folder has to hold; None where peft's layout cannot say it."""
  config = view.given[0]
  slots = [Slot(layer, path) for layer in range(len(config.layers)) for path in PATHS]
  if {*slots} != {*adapters} or not prefix.of(config).shift:
    return None
  values = [np.asarray(adapters[slot].value, np.float32) for slot in slots]
  if len({value.shape for value in values}) > 1:
    return None
  table = np.concatenate([value.reshape(len(value), -1) for value in values], axis=1)
  fields = {"num_virtual_tokens": len(table), "prefix_projection": False, **_sizes(config)}
  return Written(fields, {TENSOR: table})


def _sizes(config: TransformerConfig) -> dict[str, int]:
  """What a folder says of the model."""
  heads, width = _kv_shape(config)
  return {
    "num_layers": len(config.layers),
    "num_attention_heads": heads,
    "token_dim": heads * width,
    "num_transformer_submodules": 1,
  }


def _kv_shape(config: TransformerConfig) -> tuple[int, int]:
  mixer: Any = config.layers[0].mixer
  return mixer.kv_shape(config.width)
