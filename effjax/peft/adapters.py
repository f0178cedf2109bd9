"""Bottleneck adapters: small residual networks within the layers of a frozen model.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751, section 2.1: one
after the mixer and one after the feed-forward layer, each before it is added to the residual
stream. Pfeiffer et al., AdapterFusion, arXiv 2005.00247, section 4: the second alone. Published
code of the latter gives it norm(x + f(x)), by the layer's own norm; here both act on f(x).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax.core import trees
from effjax.core.known import number
from effjax.core.typing import Array, Float, Key, Number, Params, PyTree, Size
from effjax.layers import MLP, Context, FeedForward, LayerSpec, TransformerConfig, without_padding
from effjax.layers.axes import under
from effjax.layers.meshes import on_any_mesh
from effjax.layers.mlp import activation as known_activation
from effjax.layers.spec import ask, share
from effjax.layers.stack import change
from effjax.peft.beside import Tuned

KINDS = {"houlsby": ("after_mixer", "after_ffn"), "pfeiffer": ("after_ffn",)}


class Bottleneck(nn.Module):
  """x + inner(x): what stands after a mixer or a feed-forward layer, and adds to what it gives.

  Attributes:
    inner: any feed-forward module; an adapter's is an `MLP` of few hidden units with biases.
  """

  inner: nn.Module

  @on_any_mesh
  @nn.compact
  @without_padding
  def __call__(
    self, x: Float[Array, "B T D"], context: Context = Context()
  ) -> Float[Array, "B T D"]:
    return x + self.inner(x, context)

  @property
  def reads(self) -> tuple[str, ...]:
    """The fields of `Context` that `inner` reads."""
    return tuple(getattr(self.inner, "reads", ()))

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward."""
    return self.inner.flops(width, length, queries)

  def share(self, path: str) -> float:
    """The share of the parameter at `path` that one token uses."""
    return share({"inner": self.inner}, path)

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    return under("inner", ask(self.inner, "axes", "Bottleneck: inner"))


def add(
  config: TransformerConfig,
  params: Params,
  key: Key,
  *,
  width: Size = 64,
  kind: str = "houlsby",
  activation: str = "gelu",
  layers: Sequence[int] | None = None,
  stddev: Number = 1e-2,
) -> tuple[TransformerConfig, dict]:
  """The model with adapters y ↦ y + act(y W + b) V + c in its layers, which alone train.

  An adapter has 2·m·D + m + D parameters, where m is its width.

  Args:
    config: the model, of any layers.
    params: its parameters, of any representation.
    key: PRNG key of the adapters.
    width: hidden units m.
    kind: "houlsby", two a layer, or "pfeiffer", one after the feed-forward layer.
    activation: act, as in `MLP`.
    layers, stddev: as in `insert`.

  Raises:
    ValueError: for an unknown kind or activation, a width below 1, and as `insert`.

  Example:
    >>> config = TransformerConfig(8, 4, (LayerSpec(None, MLP(6)),))
    >>> ffn = {"up": {"kernel": jnp.ones((4, 6))}, "down": {"kernel": jnp.ones((6, 4))}}
    >>> params = {"segments_0": {"layers_0": {"ffn": ffn}}}
    >>> config, params = add(config, params, jax.random.key(0), width=2)
    >>> config.layers[0], trees.count(trees.partition(params, "after_ffn")[0]) == 2 * 2 * 4 + 2 + 4
    (LayerSpec(MLP + Bottleneck), True)
  """
  if kind not in KINDS:
    raise ValueError(f"adapters: kind={kind!r}; allowed: {', '.join(KINDS)}")
  width = number("width", width, of="adapters", integer=True, least=1)
  known_activation(activation)
  inner = MLP(width, activation, use_bias=True)
  return insert(config, params, key, inner, places=KINDS[kind], layers=layers, stddev=stddev)


def insert(
  config: TransformerConfig,
  params: Params,
  key: Key,
  inner: nn.Module,
  *,
  places: Sequence[str] = KINDS["houlsby"],
  layers: Sequence[int] | None = None,
  stddev: Number = 1e-2,
) -> tuple[TransformerConfig, dict]:
  """The model with `Bottleneck(inner)` in places of its layers, whose parameters alone train.

  So a mixture of adapters is inner = MoE(TopK(4, 2), MLP(16, use_bias=True)). Near the identity at
  the start: kernels are drawn from N(0, stddev²), truncated at two standard deviations, as the
  paper has it; other parameters start as `inner` says, biases at zero. Shapes suffice
  (`jax.eval_shape`).

  Args:
    config: the model.
    params: its parameters.
    key: PRNG key; each layer and place draws from its own.
    inner: a feed-forward module.
    places: "after_mixer", "after_ffn" or both; a layer gets those that it has something before.
    layers: indices of the layers to change, negative ones from the end; None is all.
    stddev: standard deviation of the kernels.

  Raises:
    ValueError: for a place or layer that there is none of, one that is taken, a layer with neither,
      or a module that is no feed-forward one.
  """
  if not isinstance(inner, FeedForward):
    given = f"adapters: inner is {type(inner).__name__}"
    raise ValueError(f"{given}; allowed: a feed-forward module with flops")
  allowed = KINDS["houlsby"]
  if isinstance(places, str) or not places or not {*places} <= {*allowed}:
    raise ValueError(f"adapters: places={places!r}; allowed: {allowed}, one or both")
  stddev = number("stddev", stddev, of="adapters", least=0)
  chosen = chosen_layers(config, layers)

  def of_layer(index: int, spec: LayerSpec, tree: PyTree) -> tuple[LayerSpec, PyTree]:
    if index not in chosen:
      return spec, tree
    own = [place for place in places if place.removeprefix("after_") in spec.modules]
    if not own and layers is not None:
      raise ValueError(f"adapters: layer {index} is {spec}; allowed: one with a place before")
    if taken := [place for place in own if place in spec.modules]:
      raise ValueError(f"adapters: layer {index} has something {taken[0]}; remove it first")
    layer_key = jax.random.fold_in(key, index)
    module = Bottleneck(inner)
    new = {
      place: _drawn(module, config.width, trees.path_key(layer_key, place), stddev) for place in own
    }
    return dataclasses.replace(spec, **dict.fromkeys(own, module)), {**tree, **new}

  return change(config, params, of_layer)


def remove(config: TransformerConfig, params: Params) -> tuple[TransformerConfig, dict]:
  """The model without the adapters that `add` and `insert` placed, bit-identical to what it was.

  Raises:
    ValueError: when there are none.
  """
  places = KINDS["houlsby"]
  held = lambda spec: [p for p in places if isinstance(spec.modules.get(p), Bottleneck)]
  if not any(map(held, config.layers)):
    raise ValueError("adapters: config has none; allowed: what adapters.add returns")

  def of_layer(index: int, spec: LayerSpec, tree: PyTree) -> tuple[LayerSpec, PyTree]:
    own = held(spec)
    kept = {name: value for name, value in tree.items() if name not in own}
    return dataclasses.replace(spec, **dict.fromkeys(own)), kept

  return change(config, params, of_layer)


def chosen_layers(
  config: TransformerConfig,
  layers: Sequence[int] | None,
  suits: Callable[[LayerSpec], bool] = lambda spec: True,
) -> set[int]:
  """The layers of those indices, counted from the start; None is all that suit.

  Raises:
    ValueError: for an index that no layer has, and when there is none.
  """
  count = len(config.layers)
  if layers is None:
    layers = [index for index, spec in enumerate(config.layers) if suits(spec)]
  within = functools.partial(number, "layers", integer=True, least=-count, most=count - 1)
  found = {within(index) % count for index in layers}
  if not found:
    raise ValueError(f"layers={layers!r} of {config}; allowed: one at least that suits")
  return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _drawn(module: nn.Module, width: int, key: Key, stddev: Any) -> PyTree:
  """Parameters of a module as new ones that train."""
  x, tokens = jnp.zeros((1, 1, width)), jnp.zeros((1, 1), jnp.int32)

  def draw(path, x: Array) -> Tuned:
    name = trees.path_string(path)
    if not name.endswith("kernel"):
      return Tuned(None, x)
    drawn = jax.random.truncated_normal(trees.path_key(key, name), -2, 2, x.shape, x.dtype)
    return Tuned(None, stddev * drawn)

  made = module.init(key, x, Context(tokens=tokens)).get("params", {})
  return jax.tree_util.tree_map_with_path(draw, made)
