"""Prefix-tuning: trained keys and values before the tokens, the model frozen (arXiv 2101.00190).

What trains are the arrays at "prefix_key" and "prefix_value" of each attention, and those of the
modules that attributes choose at "module_key" and "module_value": `GENERAL` and `MODULES` are their
patterns, for training in stages (`trainable=`). A prefix has no merged form: it is served as it is.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from effjax.attention.multi_head import PREFIX_INIT, Attention
from effjax.attention.prefix import TrainedPrefix
from effjax.core import trees
from effjax.core.known import check_ids, number
from effjax.core.typing import Array, Int, Key, Params, PyTree, Scalar, Size
from effjax.layers import stack
from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.models.transformer import Transformer
from effjax.peft.adapter import Tuned
from effjax.peft.compose import compose

GENERAL = r"/prefix_(key|value)/value$"
MODULES = r"/module_(key|value)/value$"
NAMES = ("prefix_key", "prefix_value", "module_key", "module_value")


def add(
  config: TransformerConfig,
  params: Params,
  key: Key,
  *,
  length: Size,
  modules: Size = 0,
  mean: bool = False,
  layers: Sequence[int] | None = None,
  bidirectional: bool = False,
  shift: bool | None = None,
) -> tuple[TransformerConfig, dict]:
  """The model with a trained prefix in its attention, drawn from N(0, 0.02²); modules start at 0.

  Each token of each document sees the prefix before it, as `attention.TrainedPrefix` says. Added
  positions move too where tokens are shifted: `config.context` is shorter by P for learned ones.
  Shapes suffice (`jax.eval_shape`).

  Args:
    config, params: the model.
    key: PRNG key; each layer draws from one of its own.
    length: P.
    modules: A, modules beside the general prefix, which each row chooses by its `attributes`.
    mean: whether the chosen modules are averaged, and not added.
    layers: indices of the layers that get one; None means all.
    bidirectional: says that tokens may see later ones, as in encoders.
    shift: whether tokens stand at P, P + 1, …; None does so where they see no later ones.

  Raises:
    ValueError: for a layer that there is none of, has a prefix or cannot have one, for a
      bidirectional model without saying so, and for a shift that leaves no learned position.

  Example:
    >>> from effjax.models import presets
    >>> params = Transformer(presets.TINY).init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> config, params = add(presets.TINY, params, jax.random.key(1), length=5)
    >>> config.layers[0].mixer.prefix.length, sorted(trees.trained(params))[0]
    (5, 'segments_0/layers_0/mixer/prefix_key/value')

  Reference: sections 4 and 7.2; positions and their order are those of Hugging Face's peft.
  """

  def start(index: int, name: str, shape: tuple[int, ...]) -> Array:
    return PREFIX_INIT(trees.path_key(key, f"{index}/{name}"), shape, jnp.float32)

  prefix = TrainedPrefix(length, modules, mean, _shift(config, layers, bidirectional, shift))
  return _put(config, params, prefix, layers, start)


def from_tokens(
  config: TransformerConfig,
  params: Params,
  tokens: Int[Array | np.ndarray, "P"] | Sequence[int],
  *,
  modules: Size = 0,
  mean: bool = False,
  layers: Sequence[int] | None = None,
  bidirectional: bool = False,
  shift: bool | None = None,
) -> tuple[TransformerConfig, dict]:
  """The same as `add`, starting from the keys and values of a text of P tokens.

  A causal model with that prefix, its tokens shifted, computes what it computes after the text.

  Args:
    tokens: ids of the text.
    config, params, modules, mean, layers, bidirectional, shift: as in `add`.

  Raises:
    ValueError: as `add`, and for tokens that are no ids [P].

  Reference: section 7.4, which starts from real words for little data.
  """
  tokens = jnp.asarray(tokens)
  if tokens.ndim != 1 or not tokens.size:
    raise ValueError(f"tokens: shape {tokens.shape}; allowed: ids [P], one or more")
  check_ids("tokens", tokens, config.vocab_size)
  prefix = TrainedPrefix(tokens.size, modules, mean, _shift(config, layers, bidirectional, shift))
  module = Transformer(dataclasses.replace(config, head=None))

  @jax.jit
  def absorbed(params: Params) -> PyTree:
    return module.apply({"params": params}, tokens[None], cache=module.init_cache(1, tokens.size))[
      1
    ]

  caches = stack.split_caches(config, absorbed(params).layers)
  start = lambda index, name, shape: getattr(caches[index], name)[0]
  return _put(config, params, prefix, layers, start)


def remove(config: TransformerConfig, params: Params) -> tuple[TransformerConfig, dict]:
  """The model as it was before its prefix was added, bit for bit.

  Raises:
    ValueError: when no layer has one.
  """
  prefix = of(config)

  def change(index: int, spec: LayerSpec, tree: PyTree) -> tuple[LayerSpec, PyTree]:
    if _prefix(spec) is None:
      return spec, tree
    mixer = {name: leaf for name, leaf in tree["mixer"].items() if name not in NAMES}
    return _with(spec, None), tree | {"mixer": mixer}

  config, params = stack.change(config, params, change)
  return _moved(config, -prefix.length if prefix.shift else 0), params


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
    >>> from effjax.models import presets
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
  return _replaced(config, plain), _mixers(params, change)


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
  return _replaced(config, more), _mixers(params, change)


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

  return _replaced(config, dataclasses.replace(prefix, modules=len(kept))), _mixers(params, change)


def of(config: TransformerConfig) -> TrainedPrefix:
  """The prefix that a model has.

  Raises:
    ValueError: when no layer has one.
  """
  for spec in config.layers:
    if (found := _prefix(spec)) is not None:
      return found
  raise ValueError("config has no prefix; allowed: what prefix.add returns")


def _modular(config: TransformerConfig) -> TrainedPrefix:
  if not (prefix := of(config)).modules:
    raise ValueError(f"config has {prefix}; allowed: a prefix with modules (prefix.add_modules)")
  return prefix


def _replaced(config: TransformerConfig, prefix: TrainedPrefix) -> TransformerConfig:
  """`config` with `prefix` wherever there is one."""
  change = lambda spec: spec if _prefix(spec) is None else _with(spec, prefix)
  return dataclasses.replace(config, layers=tuple(map(change, config.layers)))


def _mixers(tree: PyTree, change: Callable[[dict], dict]) -> PyTree:
  """`tree` with change(mixer) for the parameters of each attention that has a prefix."""
  if not isinstance(tree, Mapping):
    return tree
  if "prefix_key" in tree:
    return change(dict(tree))
  return {name: _mixers(part, change) for name, part in tree.items()}


def _put(
  config: TransformerConfig,
  params: Params,
  prefix: TrainedPrefix,
  layers: Sequence[int] | None,
  start: Callable[[int, str, tuple[int, ...]], Array],
) -> tuple[TransformerConfig, dict]:
  """The model with `prefix`, whose arrays are start(layer, "key" or "value", shape)."""
  chosen = _chosen(config, layers)

  def change(index: int, spec: LayerSpec, tree: PyTree) -> tuple[LayerSpec, PyTree]:
    if index not in chosen:
      return spec, tree
    spec, found = _with(spec, prefix), {}
    spec.mixer.check_prefix()
    for name in ("key", "value"):
      shape = (prefix.length, *spec.mixer.kv_shape(config.width))
      found[f"prefix_{name}"] = Tuned(None, start(index, name, shape))
      if prefix.modules:
        found[f"module_{name}"] = Tuned(None, jnp.zeros((prefix.modules, *shape)))
    return spec, tree | {"mixer": tree["mixer"] | found}

  moved = _moved(config, prefix.length if prefix.shift else 0)
  return stack.change(moved, params, change)


def _chosen(config: TransformerConfig, layers: Sequence[int] | None) -> set[int]:
  """Indices of layers, all of attention without a prefix."""
  count = len(config.layers)
  for index in layers or ():
    if not -count <= index < count:
      raise ValueError(f"layers has {index}; allowed: {-count} … {count - 1}")
  if any(_prefix(spec) is not None for spec in config.layers):
    raise ValueError("config has a prefix already; allowed: one (prefix.remove takes it away)")
  chosen = set(range(count)) if layers is None else {index % count for index in layers}
  for index in sorted(chosen):
    mixer = config.layers[index].mixer
    if not isinstance(mixer, Attention):
      raise ValueError(
        f"layer {index}: the mixer is {type(mixer).__name__}; allowed: Attention, or other layers="
      )
  if not chosen:
    raise ValueError(f"layers={layers!r}; allowed: one or more, or None for all")
  return chosen


def _shift(
  config: TransformerConfig,
  layers: Sequence[int] | None,
  bidirectional: bool,
  shift: bool | None,
) -> bool:
  """Whether tokens stand at P, P + 1, …

  Raises:
    ValueError: where tokens see later ones, and it was not said.
  """
  ahead = [i for i in sorted(_chosen(config, layers)) if _sees_later(config, i)]
  if ahead and not bidirectional:
    mask = config.layers[ahead[0]].mixer.mask
    raise ValueError(
      f"layer {ahead[0]}: with mask={mask} tokens see later ones; allowed: bidirectional=True, "
      "which says that this is meant"
    )
  return not ahead if shift is None else shift


def _sees_later(config: TransformerConfig, index: int) -> bool:
  """Whether the first of all tokens sees another."""
  mask = config.layers[index].mixer.mask
  with jax.ensure_compile_time_eval():
    first = jnp.zeros((1, 1), jnp.int32)
    return bool(mask.dense(1, max(2, config.context), first)[..., 1:].any())


def _moved(config: TransformerConfig, by: int) -> TransformerConfig:
  """`config` with the vectors that are added to embeddings beginning `by` later."""
  if config.positions is None:
    return config
  context = config.context - (by if config.positions == "learned" else 0)
  if context < 1:
    raise ValueError(
      f"length {by}: shifts tokens past the {config.context} learned positions; allowed: up to "
      f"{config.context - 1}, or shift=False"
    )
  return dataclasses.replace(config, position_offset=config.position_offset + by, context=context)


def _prefix(spec: LayerSpec) -> TrainedPrefix | None:
  return getattr(spec.mixer, "prefix", None)


def _with(spec: LayerSpec, prefix: TrainedPrefix | None) -> LayerSpec:
  return dataclasses.replace(spec, mixer=spec.mixer.clone(prefix=prefix))
