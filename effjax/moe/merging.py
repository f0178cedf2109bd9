"""Back to dense: the experts of a mixture become one MLP.

What splitting cut apart is put together, hidden unit by hidden unit; of upcycled experts the mean
is taken (as in a soup of models, Wortsman et al., arXiv 2203.05482), or one of them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import trees
from effjax.core.known import number
from effjax.core.typing import Array, Params, PyTree, Size
from effjax.core.weights import is_weight
from effjax.layers import MLP, LayerSpec, TransformerConfig
from effjax.layers.stack import change
from effjax.moe.layer import MoE
from effjax.moe.units import chosen_ffns, each

BY = ("concatenation", "mean")


def merge_experts(
  config: TransformerConfig,
  params: Params,
  *,
  by: str | Size = "concatenation",
  layers: Sequence[int] | None = None,
) -> tuple[TransformerConfig, dict]:
  """The model with one MLP in place of the mixtures of `layers`; routers are dropped.

  | by | y | the same as before |
  |---|---|---|
  | "concatenation" | Σ_e expert_e(x) | where all gates are one; it undoes `split_ffn` |
  | "mean" | the MLP of mean parameters | where all experts are equal; it undoes `upcycle` |
  | e | expert_e(x) | likewise |

  What every token visits besides, shared(x), is added: its hidden units follow the others.

  Args:
    config: a model with `MoE` layers whose experts, and what is shared, are `MLP`s.
    params: its parameters, arrays; where one expert is taken and none is shared, any weights.
    by: see above; e counts from 0.
    layers: indices of the layers to change, negative ones from the end; None means every layer
      whose ffn is an `MoE`.

  Returns:
    The new configuration, without a published layout to save to, and its parameters.

  Raises:
    ValueError: when a layer does not exist or is no such mixture, `by` is unknown, or a weight that
      is no plain array would have to be put together with others.

  Example:
    >>> from effjax.moe import TopK
    >>> config = TransformerConfig(8, 4, (LayerSpec(None, MoE(TopK(3, 1), MLP(2))),))
    >>> experts = {"up": {"kernel": jnp.ones((3, 4, 2))}, "down": {"kernel": jnp.ones((3, 2, 4))}}
    >>> params = {"segments_0": {"layers_0": {"ffn": {"experts": experts, "router": {}}}}}
    >>> dense, params = merge_experts(config, params)
    >>> dense.layers[0].ffn.width, params["segments_0"]["layers_0"]["ffn"]["up"]["kernel"].shape
    (6, (4, 6))
  """
  chosen = chosen_ffns("merge_experts", config, layers, MoE)
  if isinstance(by, str) and by not in BY:
    raise ValueError(f"merge_experts: by={by!r}; allowed: {', '.join(BY)}, or an expert's number")

  def of_layer(index: int, spec: LayerSpec, tree: PyTree) -> tuple[LayerSpec, PyTree]:
    if index not in chosen:
      return spec, tree
    try:
      mlp, ffn = _merged(chosen[index], tree["ffn"], by)
    except ValueError as error:
      raise ValueError(f"merge_experts: layer {index}: {error}") from error
    return dataclasses.replace(spec, ffn=mlp), {**tree, "ffn": ffn}

  changed, params = change(config, params, of_layer)
  return dataclasses.replace(changed, family=None), params


def _merged(layer: MoE, params: Params, by: str | Size) -> tuple[MLP, dict]:
  """The MLP that the experts, and what is shared, become."""
  expert: Any = layer.expert
  shared: Any = layer.shared
  for name, module in (("expert", expert), ("shared", shared or expert)):
    if not isinstance(module, MLP):
      raise ValueError(f"{name} is {type(module).__name__}; allowed: MLP")
  if shared is not None and shared != expert.clone(width=shared.width):
    raise ValueError("shared is another MLP than the experts are; allowed: another width alone")
  if other := sorted(set(params) - {"experts", "router", "shared"}):
    raise ValueError(f"params has {', '.join(other)}; allowed: experts, router, shared")
  one = _one(expert, params["experts"], layer.router.experts, by)
  width = expert.width * (layer.router.experts if by == "concatenation" else 1)
  if shared is None:
    return expert.clone(width=width), one
  both = lambda path, x, axis: _together(path, [x, trees.items(params["shared"])[path]], axis)
  return expert.clone(width=width + shared.width), each(expert, one, both)


def _one(mlp: MLP, experts: Params, count: int, by: str | Size) -> dict:
  """What the experts become by themselves."""
  if not isinstance(by, str):
    index = number("by", by, integer=True, least=0, most=count - 1)
    return jax.tree.map(lambda x: x[index], dict(experts))
  of = _together if by == "concatenation" else _mean
  return each(mlp, experts, lambda path, leaf, axis: of(path, leaf, axis))


def _together(path: str, leaves: Any, axis: int | None) -> Array:
  """Hidden units one after the other, or without an axis of these the sum."""
  plain = _plain(path, leaves)
  return jnp.stack(plain).sum(axis=0) if axis is None else jnp.concatenate(plain, axis)


def _mean(path: str, leaf: Any, axis: int | None) -> Array:
  del axis
  return jnp.stack(_plain(path, leaf)).mean(axis=0)


def _plain(path: str, leaves: Any) -> list[Array]:
  for leaf in [leaves] if is_weight(leaves) else leaves:
    if is_weight(leaf):
      raise ValueError(f"{path} is {leaf!r}; allowed: plain arrays, to merge or dequantize before")
  return list(leaves)
