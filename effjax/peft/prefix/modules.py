"""Modules beside a prefix, chosen by rows, composed, and taken away exactly."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from effjax.attention.prefix import TrainedPrefix
from effjax.core.known import check_ids, number
from effjax.core.typing import Params, PyTree, Scalar, Size
from effjax.layers.spec import TransformerConfig
from effjax.peft.adapter import Tuned
from effjax.peft.compose import compose
from effjax.peft.prefix.layers import of, replaced


def fold(
  config: TransformerConfig, params: Params, weights: Mapping[int, Scalar]
) -> tuple[TransformerConfig, dict]:
  """The model with P_general + Σ_a w_a·P_a as its prefix, without modules, for all rows.

  So one combination is served, and learned weights mix modules: params as a function of weights is
  a view (`layers.objective.through`). What has no weight is not read.

  Args:
    config, params: a model whose prefix has modules.
    weights: module → w_a, 1 for what a row's attributes would choose; the mean where that is the
      prefix's way.

  Raises:
    ValueError: for a module that there is none of, and a prefix without modules.

  Example:
    >>> import jax
    >>> from effjax.models import Transformer, presets
    >>> from effjax.peft.prefix import add
    >>> params = Transformer(presets.TINY).init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> config, params = add(presets.TINY, params, jax.random.key(1), length=5, modules=3)
    >>> view = lambda trained: fold(config, params, dict(enumerate(trained)))[1]
    >>> jax.eval_shape(view, jnp.ones(3))["segments_0"]["layers_0"]["mixer"].keys()
    dict_keys(['key', 'out', 'prefix_key', 'prefix_value', 'query', 'value'])
  """
  prefix = _modular(config)

  def change(mixer: dict) -> dict:
    kept = {name: leaf for name, leaf in mixer.items() if not name.startswith("module_")}
    for name in ("key", "value"):
      modules, general = (mixer[f"{part}_{name}"].value for part in ("module", "prefix"))
      each = {a: modules[..., a, :, :, :] for a in range(prefix.modules)}
      kept[f"prefix_{name}"] = Tuned(None, compose(general, each, weights, mean=prefix.mean))
    return kept

  plain = dataclasses.replace(prefix, modules=0, mean=False)
  return replaced(config, plain), _mixers(params, change)


def add_modules(
  config: TransformerConfig, params: Params, count: Size = 1
) -> tuple[TransformerConfig, dict]:
  """The model with `count` more modules, of zeros; the others and what they compute stay.

  Raises:
    ValueError: when no layer has a prefix, and for a count below 1.
  """
  prefix, count = of(config), number("count", count, integer=True, least=1)

  def change(mixer: dict) -> dict:
    found = {}
    for name in ("key", "value"):
      *stack, P, K, H = mixer[f"prefix_{name}"].shape
      old = [mixer[f"module_{name}"].value] if prefix.modules else []
      new = jnp.zeros((*stack, count, P, K, H))
      found[f"module_{name}"] = Tuned(None, jnp.concatenate([*old, new], axis=-4))
    return mixer | found

  more = dataclasses.replace(prefix, modules=prefix.modules + count)
  return replaced(config, more), _mixers(params, change)


def remove_modules(
  config: TransformerConfig, params: Params, modules: Sequence[int]
) -> tuple[TransformerConfig, dict]:
  """The model without some modules; those after them are known by lower ids, and not changed.

  Raises:
    ValueError: for a module that there is none of, and a prefix without modules.
  """
  prefix = _modular(config)
  check_ids("modules", np.asarray(modules, np.int64), prefix.modules)
  kept = [a for a in range(prefix.modules) if a not in modules]

  def change(mixer: dict) -> dict:
    left = {name: leaf for name, leaf in mixer.items() if not name.startswith("module_")}
    for name in ("module_key", "module_value") if kept else ():
      left[name] = Tuned(None, mixer[name].value[..., jnp.asarray(kept), :, :, :])
    return left

  return replaced(config, dataclasses.replace(prefix, modules=len(kept))), _mixers(params, change)


def _modular(config: TransformerConfig) -> TrainedPrefix:
  if not (prefix := of(config)).modules:
    raise ValueError(f"config has {prefix}; allowed: a prefix with modules (prefix.add_modules)")
  return prefix


def _mixers(tree: PyTree, change: Callable[[dict], dict]) -> PyTree:
  """`tree` with change(mixer) for the parameters of each attention that has a prefix."""
  if not isinstance(tree, Mapping):
    return tree
  if "prefix_key" in tree:
    return change(dict(tree))
  return {name: _mixers(part, change) for name, part in tree.items()}
