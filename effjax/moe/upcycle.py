"""Sparse upcycling: a dense model's MLPs become experts (Komatsuzaki et al., arXiv 2212.05055).

Section 3.1: every expert starts as a copy of the MLP and the router is drawn afresh. The gates are
renormalised, so the experts' equal outputs are mixed with weights that sum to one and the model
computes at first what the dense one did.

Experts that are narrower or wider than the MLP start as Qwen2's (arXiv 2407.10671, section 2.2.2):
the MLP is replicated ⌈E·width / F⌉ times, the hidden units of each copy are shuffled, and the
copies, one after the other, are sliced into experts; what is left over is dropped. So that they
differ, half of each is drawn anew. Of a Qwen MoE that is F = 5632 in 17 copies, 64 experts of 1408.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import trees
from effjax.core.known import number
from effjax.core.typing import Array, Int, Key, Number, Params, PyTree, Size
from effjax.core.weights import is_weight
from effjax.layers import MLP, LayerSpec, TransformerConfig
from effjax.layers.stack import change
from effjax.moe.layer import MoE
from effjax.moe.units import chosen_ffns, each, parts, router_of


def upcycle(
  config: TransformerConfig,
  params: Params,
  key: Key,
  *,
  experts: Size = 8,
  top_k: Size = 2,
  width: Size | None = None,
  redrawn: Number = 0.0,
  layers: Sequence[int] | None = None,
  load_balance: Number = 0.01,
  z: Number = 0.001,
  stddev: Number = 0.02,
) -> tuple[TransformerConfig, dict]:
  """The model with the MLPs of `layers` replaced by mixtures of copies, or parts, of them.

  It computes what the dense one did, whichever experts a token visits, where they are whole copies
  of which nothing is drawn anew. Qwen's recipe, `width` and `redrawn=0.5`, does not.

  Args:
    config: the dense model.
    params: its parameters; kernels may be weights of any representation that holds hidden units
      apart, or of any at all where `width` is None.
    key: PRNG key of the routers, of the shuffling and of what is drawn anew.
    experts: number of experts E.
    top_k: experts a token visits.
    width: hidden width of an expert; None makes whole copies.
    redrawn: the share of each expert's hidden units, 0 … 1, that are drawn anew, from the same
      distribution as the routers, with biases of 0. They have to be in plain arrays.
    layers: indices of the layers to change, negative ones from the end; None means every layer
      whose ffn is an `MLP`.
    load_balance, z: coefficients of the losses, see `TopK`.
    stddev: of the normal distribution of what is drawn (section 3.1 of the first paper: 0.02).

  Returns:
    The new configuration, without a published layout to save to, and its parameters.

  Raises:
    ValueError: when a layer does not exist or its ffn is not an `MLP`; for numbers out of range;
      for a representation that does not allow what is asked for.

  Example:
    >>> from effjax.layers import LayerSpec
    >>> config = TransformerConfig(8, 4, (LayerSpec(mixer=None, ffn=MLP(6)),))
    >>> ffn = {"up": {"kernel": jnp.ones((4, 6))}, "down": {"kernel": jnp.ones((6, 4))}}
    >>> params = {"segments_0": {"layers_0": {"ffn": ffn}}}
    >>> moe, params = upcycle(config, params, jax.random.key(0), experts=3, top_k=1)
    >>> params["segments_0"]["layers_0"]["ffn"]["experts"]["up"]["kernel"].shape
    (3, 4, 6)
  """
  router = router_of("upcycle", experts, top_k, load_balance=load_balance, z=z)
  chosen = chosen_ffns("upcycle", config, layers, MLP)
  keys = dict(zip(chosen, jax.random.split(key, len(chosen)), strict=True))
  options: Any = {"experts": experts, "width": width, "redrawn": redrawn, "stddev": stddev}

  def of_layer(index: int, spec: LayerSpec, tree: PyTree) -> tuple[LayerSpec, PyTree]:
    if index not in chosen:
      return spec, tree
    ffn = upcycle_ffn(tree["ffn"], keys[index], **options)
    expert = chosen[index] if width is None else chosen[index].clone(width=width)
    return dataclasses.replace(spec, ffn=MoE(router, expert)), {**tree, "ffn": ffn}

  changed, params = change(config, params, of_layer)
  return dataclasses.replace(changed, family=None), params


def upcycle_ffn(
  params: Params,
  key: Key,
  *,
  experts: Size,
  width: Size | None = None,
  redrawn: Number = 0.0,
  stddev: Number = 0.02,
) -> dict:
  """Parameters of an `MoE` whose experts all equal the `MLP` with `params`, or start from it.

  Args:
    params: "up", "down" and perhaps "gate", each a kernel [D, F] and perhaps a bias.
    key: PRNG key.
    experts: number of copies E.
    width, redrawn, stddev: see `upcycle`.

  Raises:
    ValueError: when `params` are not those of an `MLP`, and as `upcycle`.

  Example:
    >>> ffn = {"up": {"kernel": jnp.ones((4, 6))}, "down": {"kernel": jnp.ones((6, 4))}}
    >>> moe = upcycle_ffn(ffn, jax.random.key(0), experts=3, width=4)
    >>> moe["router"]["kernel"].shape, moe["experts"]["down"]["kernel"].shape
    ((4, 3), (3, 4, 4))
  """
  experts = number("experts", experts, of="upcycle", integer=True, least=1)
  redrawn = number("redrawn", redrawn, of="upcycle", least=0, most=1)
  stddev = number("stddev", stddev, of="upcycle", least=0)
  mlp, (inputs, hidden) = _mlp(params)
  router = {"kernel": stddev * jax.random.normal(key, (inputs, experts), jnp.float32)}
  if width is None:
    made = jax.tree.map(lambda x: jnp.repeat(x[None], experts, axis=0), dict(params))
  else:
    width = number("width", width, of="upcycle", integer=True, least=1)
    units = shuffled(jax.random.fold_in(key, 0), hidden, experts=experts, width=width)
    try:
      made = parts(mlp, params, units)
    except ValueError as error:
      raise ValueError(f"upcycle: width={width}: {error}") from error
  if redrawn:
    made = _redrawn(mlp, made, jax.random.fold_in(key, 1), redrawn, stddev)
  return {"experts": made, "router": router}


def shuffled(key: Key, hidden: Size, *, experts: Size, width: Size) -> Int[Array, "E n"]:
  """The hidden units of each expert: slices of copies 0 … F − 1, each in an order of its own.

  Each unit is in as many experts as another, or in one more.

  Args:
    key: PRNG key.
    hidden: units F.
    experts, width: what is sliced.

  Example:
    >>> units = shuffled(jax.random.key(0), 4, experts=3, width=2)
    >>> units.shape, sorted(units.reshape(-1)[:4].tolist())
    ((3, 2), [0, 1, 2, 3])
  """
  copies = math.ceil(experts * width / hidden)
  orders = jax.vmap(lambda key: jax.random.permutation(key, hidden))(jax.random.split(key, copies))
  return orders.reshape(-1)[: experts * width].reshape(experts, width)


def _redrawn(mlp: MLP, made: Params, key: Key, share: Number, stddev: Number) -> dict:
  """The experts with new numbers for a share of the hidden units of each."""
  experts, _, width = made["up"]["kernel"].shape
  drawn = jnp.arange(width)[None] < round(share * width)
  mask = jax.random.permutation(key, jnp.repeat(drawn, experts, axis=0), axis=1, independent=True)

  def of(path: str, leaf: Any, axis: int | None) -> Any:
    if axis is None:
      return leaf
    if is_weight(leaf):
      raise ValueError(f"upcycle: redrawn={share} and {path} is {leaf!r}; allowed: plain arrays")
    new = jnp.zeros((), leaf.dtype)
    if leaf.ndim == 3:
      normal = jax.random.normal(trees.path_key(key, path), leaf.shape, jnp.float32)
      new = (stddev * normal).astype(leaf.dtype)
    units = mask if leaf.ndim == 2 else jnp.expand_dims(mask, 1 if axis == -1 else 2)
    return jnp.where(units, new, leaf)

  return each(mlp, made, of)


def _mlp(params: Params) -> tuple[MLP, tuple[int, int]]:
  """The module that `params` are those of, and the shape [D, F] of its first matrix."""
  if not {"up", "down"} <= set(params) <= {"up", "gate", "down"}:
    raise ValueError(f"upcycle: params has {sorted(params)}; allowed: up, down, perhaps gate")
  shape = params["up"]["kernel"].shape
  return MLP(shape[1], gated="gate" in params, use_bias="bias" in params["up"]), tuple(shape)
