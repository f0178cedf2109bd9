"""A prefix put on a model, and taken away."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import trees
from effjax.core.known import check_ids, number
from effjax.core.typing import Array, Int, Key, Params, PyTree, Size
from effjax.layers import stack
from effjax.layers.prefix import INIT, TrainedPrefix
from effjax.layers.spec import LayerSpec, TransformerConfig, ask
from effjax.peft.beside import Tuned
from effjax.peft.prefix.layers import of, prefix_of, with_prefix

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
    >>> from effjax.models import Transformer, presets
    >>> params = Transformer(presets.TINY).init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> config, params = add(presets.TINY, params, jax.random.key(1), length=5)
    >>> config.layers[0].mixer.prefix.length, sorted(trees.trained(params))[0]
    (5, 'segments_0/layers_0/mixer/prefix_key/value')

  Reference: sections 4 and 7.2; positions and their order are those of Hugging Face's peft.
  """

  def start(index: int, name: str, shape: tuple[int, ...]) -> Array:
    return INIT(trees.path_key(key, f"{index}/{name}"), shape, jnp.float32)

  prefix = TrainedPrefix(length, modules, mean, _shift(config, layers, bidirectional, shift))
  return _put(config, params, prefix, layers, start)


def from_tokens(
  module: nn.Module,
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
    module: the model, a `Transformer`.
    tokens: ids of the text.
    params, modules, mean, layers, bidirectional, shift: as in `add`.

  Raises:
    ValueError: as `add`, and for tokens that are no ids [P].

  Reference: section 7.4, which starts from real words for little data.
  """
  config, tokens = ask(module, "config", "module"), jnp.asarray(tokens)
  if tokens.ndim != 1 or not tokens.size:
    raise ValueError(f"tokens: shape {tokens.shape}; allowed: ids [P], one or more")
  check_ids("tokens", tokens, config.vocab_size)
  prefix = TrainedPrefix(tokens.size, modules, mean, _shift(config, layers, bidirectional, shift))
  reader: Any = module.clone(config=dataclasses.replace(config, head=None))

  @jax.jit
  def absorbed(params: Params) -> Any:
    cache = reader.init_cache(1, tokens.size)
    return reader.apply({"params": params}, tokens[None], cache=cache)[1].layers

  caches = stack.split_caches(config, absorbed(params))
  start = lambda index, name, shape: getattr(caches[index], name)[0]
  return _put(config, params, prefix, layers, start)


def remove(config: TransformerConfig, params: Params) -> tuple[TransformerConfig, dict]:
  """The model as it was before its prefix was added, bit for bit.

  Raises:
    ValueError: when no layer has one.
  """
  prefix = of(config)

  def change(index: int, spec: LayerSpec, tree: PyTree) -> tuple[LayerSpec, PyTree]:
    if prefix_of(spec) is None:
      return spec, tree
    mixer = {name: leaf for name, leaf in tree["mixer"].items() if name not in NAMES}
    return with_prefix(spec, None), tree | {"mixer": mixer}

  config, params = stack.change(config, params, change)
  return _moved(config, -prefix.length if prefix.shift else 0), params


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
    spec, found = with_prefix(spec, prefix), dict[str, Tuned]()
    mixer: Any = spec.mixer
    mixer.check_prefix()
    for name in ("key", "value"):
      shape = (prefix.length, *mixer.kv_shape(config.width))
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
    number("layers has", index, integer=True, least=-count, most=count - 1)
  if any(prefix_of(spec) is not None for spec in config.layers):
    raise ValueError("config has a prefix already; allowed: one (prefix.remove takes it away)")
  chosen = set(range(count)) if layers is None else {index % count for index in layers}
  for index in sorted(chosen):
    mixer = config.layers[index].mixer
    if not hasattr(mixer, "check_prefix"):
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
    mask = _mask(config, ahead[0])
    raise ValueError(
      f"layer {ahead[0]}: with mask={mask} tokens see later ones; allowed: bidirectional=True, "
      "which says that this is meant"
    )
  return not ahead if shift is None else shift


def _sees_later(config: TransformerConfig, index: int) -> bool:
  """Whether the first of all tokens sees another."""
  mask = _mask(config, index)
  with jax.ensure_compile_time_eval():
    first = jnp.zeros((1, 1), jnp.int32)
    return bool(mask.dense(1, max(2, config.context), first)[..., 1:].any())


def _mask(config: TransformerConfig, index: int) -> Any:
  return ask(config.layers[index].mixer, "mask", f"layer {index}: mixer")


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
