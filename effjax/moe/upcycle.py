"""Sparse upcycling: a dense model's MLPs become experts (Komatsuzaki et al., arXiv 2212.05055).

Section 3.1: every expert starts as a copy of the MLP and the router is drawn afresh. The gates are
renormalised, so the experts' equal outputs are mixed with weights that sum to one and the model
computes at first what the dense one did.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from effjax.core.known import number
from effjax.core.typing import Key, Number, Params, Size
from effjax.layers import MLP, TransformerConfig
from effjax.layers.stack import join, split
from effjax.moe.layer import MoE
from effjax.moe.routers import TopK


def upcycle(
  config: TransformerConfig,
  params: Params,
  key: Key,
  *,
  experts: Size = 8,
  top_k: Size = 2,
  layers: Sequence[int] | None = None,
  load_balance: float = 0.01,
  z: float = 0.001,
) -> tuple[TransformerConfig, dict]:
  """The model with the MLPs of `layers` replaced by mixtures of copies of them.

  Args:
    config: the dense model.
    params: its parameters; kernels may be weights of any representation.
    key: PRNG key of the routers.
    experts: number of experts E.
    top_k: experts a token visits.
    layers: indices of the layers to change, negative ones from the end; None means every layer
      whose ffn is an `MLP`.
    load_balance, z: coefficients of the losses, see `TopK`.

  Returns:
    The new configuration, without a published layout to save to, and its parameters.

  Raises:
    ValueError: when a layer does not exist or its ffn is not an `MLP`.

  Example:
    >>> from effjax.layers import LayerSpec
    >>> config = TransformerConfig(8, 4, (LayerSpec(mixer=None, ffn=MLP(6)),))
    >>> ffn = {"up": {"kernel": jnp.ones((4, 6))}, "down": {"kernel": jnp.ones((6, 4))}}
    >>> params = {"segments_0": {"layers_0": {"ffn": ffn}}}
    >>> moe, params = upcycle(config, params, jax.random.key(0), experts=3, top_k=1)
    >>> params["segments_0"]["layers_0"]["ffn"]["experts"]["up"]["kernel"].shape
    (3, 4, 6)
  """
  chosen = _chosen(config, layers)
  specs = list(config.layers)
  trees, rest = split(config, params)
  keys = jax.random.split(key, len(chosen))
  for (index, mlp), layer_key in zip(chosen.items(), keys, strict=True):
    ffn = upcycle_ffn(trees[index]["ffn"], layer_key, experts=experts)
    trees[index] = {**trees[index], "ffn": ffn}
    router = TopK(experts, top_k, load_balance=load_balance, z=z)
    specs[index] = dataclasses.replace(specs[index], ffn=MoE(router, mlp))
  changed = dataclasses.replace(config, layers=tuple(specs), family=None)
  return changed, join(changed, trees, rest)


def upcycle_ffn(params: Params, key: Key, *, experts: Size, stddev: Number = 0.02) -> dict:
  """Parameters of an `MoE` whose experts all equal the `MLP` with `params`.

  Args:
    params: "up", "down" and perhaps "gate", each a kernel [D, F] and perhaps a bias.
    key: PRNG key of the router.
    experts: number of copies E.
    stddev: of the router's normal distribution (section 3.1 of the paper: 0.02).

  Raises:
    ValueError: when `params` are not those of an `MLP`, or `experts` is below 1.

  Example:
    >>> ffn = {"up": {"kernel": jnp.ones((4, 6))}, "down": {"kernel": jnp.ones((6, 4))}}
    >>> moe = upcycle_ffn(ffn, jax.random.key(0), experts=3)
    >>> moe["router"]["kernel"].shape, moe["experts"]["down"]["kernel"].shape
    ((4, 3), (3, 6, 4))
  """
  experts = number("experts", experts, of="upcycle", integer=True, least=1)
  stddev = number("stddev", stddev, of="upcycle", least=0)
  if not {"up", "down"} <= set(params) <= {"up", "gate", "down"}:
    raise ValueError(f"upcycle: params has {sorted(params)}; allowed: up, down, perhaps gate")
  copies = jax.tree.map(lambda x: jnp.repeat(x[None], experts, axis=0), dict(params))
  width = params["up"]["kernel"].shape[0]
  router = stddev * jax.random.normal(key, (width, experts), jnp.float32)
  return {"experts": copies, "router": {"kernel": router}}


def _chosen(config: TransformerConfig, layers: Sequence[int] | None) -> dict[int, MLP]:
  """Index → ffn of the layers to change, in their order."""
  ffns = [spec.ffn for spec in config.layers]
  count, found = len(ffns), {}
  if layers is None:
    layers = [index for index, ffn in enumerate(ffns) if isinstance(ffn, MLP)]
  for index in layers:
    if not -count <= index < count:
      raise ValueError(f"upcycle: layers has {index}; allowed: {-count} … {count - 1}")
    ffn = ffns[index]
    if not isinstance(ffn, MLP):
      raise ValueError(f"upcycle: the ffn of layer {index} is {type(ffn).__name__}; allowed: MLP")
    found[index % count] = ffn
  if not found:
    raise ValueError("upcycle: no layer to change; allowed: layers whose ffn is an MLP")
  return dict(sorted(found.items()))
