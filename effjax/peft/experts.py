"""An expert as the adapter: a mixture of LoRA experts over one frozen feed-forward layer.

Li et al., MixLoRA, arXiv 2404.15159, section 3.1: the matrices of an expert are the frozen ones,
which are not copied, plus factors of its own, and one router chooses for the whole layer. In MoLoRA
(Zadouri et al., arXiv 2309.05444) each matrix has a router, and all its experts are mixed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax.core import trees, weights
from effjax.core.trees import Chooser
from effjax.core.typing import Array, Key, Params, PyTree
from effjax.core.weights import Over, linear, materialize, register, transpose
from effjax.layers import MLP, Context, LayerSpec, Router, TransformerConfig
from effjax.layers.stack import change
from effjax.peft import lora
from effjax.peft.adapters import chosen_layers
from effjax.peft.beside import Tuned, is_adapter

TARGETS = r"kernel$"
Mixture = Callable[[nn.Module], nn.Module]


@register(static=("count", "axes"))
class Shared(Over):
  """One parameter for all of E experts: [..., E, D, F], of which there is one [..., D, F].

  Its array lacks the experts' axis. So a grouped product takes it by parts, and its part of one is
  the plain product; to layers that are stacked it is as any weight.

  Invariants:
    base: the array or `Weight`, [..., D, F], or [..., F].
    count: experts E.
    axes: how many axes one expert's has, 2 for a matrix and 1 for a vector.
  """

  count: int
  axes: int = 2

  by_parts = True

  @property
  def shape(self) -> tuple[int, ...]:
    shape = tuple(self.base.shape)
    return (*shape[: -self.axes], self.count, *shape[-self.axes :])

  def check(self) -> None:
    if self.count < 1 or self.axes not in (1, 2) or len(self.base.shape) < self.axes:
      given = f"count={self.count}, axes={self.axes}, base {tuple(self.base.shape)}"
      raise ValueError(f"Shared: {given}; allowed: 1 expert or more, of matrices or vectors")

  def specs(self, axes: Sequence[Any]) -> "Shared":
    own = len(axes) - self.axes
    along = (*axes[: own - 1], *axes[own:])
    return dataclasses.replace(self, base=weights.specs(self.base, along))

  def materialize(self) -> Array:
    base = jnp.expand_dims(materialize(self.base), -1 - self.axes)
    return jnp.broadcast_to(base, self.shape)

  def product(self, x: Array, multiply: Callable[[Array, Any], Array]) -> Array:
    return linear(x, self.base)

  @property
  def T(self) -> "Shared":
    return dataclasses.replace(self, base=transpose(self.base))


def add(
  config: TransformerConfig,
  params: Params,
  key: Key,
  mixture: Mixture,
  *,
  layers: Sequence[int] | None = None,
  targets: Chooser = TARGETS,
  **options: Any,
) -> tuple[TransformerConfig, dict]:
  """The model with a mixture of LoRA experts in place of its MLPs; factors and router alone train.

  y = Σ_e gate_e(x) · MLP(x; W + s·A_e B_e). B = 0 at the start, so that with gates that sum to one
  the model computes what it did. The router's losses are sown as in every mixture.

  Args:
    config: the model.
    params: its parameters, of any representation.
    key: PRNG key of the routers and the factors.
    mixture: expert → a layer with a `router` and an `expert`, whose parameters are "router" and
      "experts", as `functools.partial(MoE, TopK(8, 2))`.
    layers: indices of the layers to change, negative ones from the end; None is every layer whose
      ffn is an `MLP`.
    targets: pattern or predicate on paths of the experts' matrices, such as "experts/up/kernel".
    **options: rank, alpha and what else `lora.add` takes.

  Returns:
    The new configuration and its parameters; `remove` gives back what they were.

  Raises:
    ValueError: for a layer that there is none of, or whose ffn is no `MLP` or has adapters, for a
      mixture of other parts, and as `lora.add`.

  Example:
    >>> from functools import partial
    >>> from effjax.moe import MoE, TopK
    >>> config = TransformerConfig(8, 4, (LayerSpec(None, MLP(6)),))
    >>> ffn = {"up": {"kernel": jnp.ones((4, 6))}, "down": {"kernel": jnp.ones((6, 4))}}
    >>> params = {"segments_0": {"layers_0": {"ffn": ffn}}}
    >>> config, params = add(config, params, jax.random.key(0), partial(MoE, TopK(3, 2)), rank=2)
    >>> up = params["segments_0"]["layers_0"]["ffn"]["experts"]["up"]["kernel"]
    >>> up.shape, up.a.shape, up.base.base.shape
    ((3, 4, 6), (3, 4, 2), (4, 6))
  """
  chosen = chosen_layers(config, layers, lambda spec: isinstance(spec.ffn, MLP))

  def of_layer(index: int, spec: LayerSpec, tree: PyTree) -> tuple[LayerSpec, PyTree]:
    if index not in chosen:
      return spec, tree
    layer: Any = mixture(_mlp(index, spec, tree))
    _check_mixture(layer, spec.ffn)
    layer_key = jax.random.fold_in(key, index)
    share = lambda path, x: Shared(x, layer.router.experts, 1 if path.endswith("bias") else 2)
    experts = {"experts": trees.update(tree["ffn"], "", share)}
    experts = lora.add(experts, layer_key, targets=targets, **options)
    if not all(_shared(leaf) for leaf in trees.items(experts).values()):
      raise ValueError("experts: start changes the shared matrix; allowed: one that leaves it")
    router = _router(layer.router, config.width, trees.path_key(layer_key, "router"))
    ffn = experts | ({"router": router} if router else {})
    _check_parameters(layer, ffn, config.width)
    return dataclasses.replace(spec, ffn=layer), {**tree, "ffn": ffn}

  return change(config, params, of_layer)


def remove(config: TransformerConfig, params: Params) -> tuple[TransformerConfig, dict]:
  """The model with its MLPs in place of mixtures over them, bit-identical to what it was.

  Raises:
    ValueError: when there are none.
  """
  removed = []

  def of_layer(index: int, spec: LayerSpec, tree: PyTree) -> tuple[LayerSpec, PyTree]:
    experts = trees.items(tree.get("ffn", {}).get("experts", {}))
    if not any(_shared(leaf) for leaf in experts.values()):
      return spec, tree
    removed.append(index)
    ffn = trees.update(tree["ffn"]["experts"], "", lambda path, leaf: _shared(leaf).base)
    mixture: Any = spec.ffn
    return dataclasses.replace(spec, ffn=mixture.expert), {**tree, "ffn": ffn}

  changed = change(config, params, of_layer)
  if not removed:
    raise ValueError("experts: params has none over one MLP; allowed: what experts.add returns")
  return changed


def _shared(leaf: Any) -> Any:
  """The `Shared` below a weight's adapters, or None."""
  if is_adapter(leaf):
    return _shared(leaf.base)
  return leaf if isinstance(leaf, Shared) else None


def _router(router: nn.Module, width: int, key: Key) -> PyTree:
  """Parameters of a router as new ones that train."""
  rows, context = jnp.zeros((1, width)), Context(tokens=jnp.zeros((1, 1), jnp.int32))
  made = router.clone(parent=None, name=None).init(
    {"params": key, "router": key}, rows, context, None
  )
  return jax.tree.map(lambda x: Tuned(None, x), made.get("params", {}))


def _mlp(index: int, spec: LayerSpec, tree: PyTree) -> MLP:
  """The ffn of a layer, without adapters; ValueError for another."""
  if not isinstance(spec.ffn, MLP):
    given = f"experts: the ffn of layer {index} is {type(spec.ffn).__name__}"
    raise ValueError(f"{given}; allowed: MLP")
  for path, leaf in trees.items(tree["ffn"]).items():
    if is_adapter(leaf):
      given = f"experts: ffn/{path} of layer {index} is a {type(leaf).__name__}"
      raise ValueError(f"{given}; merge or detach it first")
  return spec.ffn


def _check_mixture(layer: Any, expert: nn.Module | None) -> None:
  if not isinstance(getattr(layer, "router", None), Router) or layer.expert != expert:
    allowed = "a layer with a router and that expert, as partial(MoE, TopK(8, 2)) gives"
    raise ValueError(f"experts: mixture gives {type(layer).__name__}; allowed: {allowed}")


def _check_parameters(layer: nn.Module, ffn: PyTree, width: int) -> None:
  """Raises ValueError where the mixture has parameters that it would not get here."""
  context = Context(tokens=jnp.zeros((1, 1), jnp.int32))
  init = lambda: layer.init(jax.random.key(0), jnp.zeros((1, 1, width)), context)["params"]
  wanted, made = trees.items(jax.eval_shape(init)), trees.items(ffn)
  if more := sorted(wanted.keys() - made.keys()):
    raise ValueError(f"experts: mixture has {trees.some(more)} besides; allowed: router, experts")
