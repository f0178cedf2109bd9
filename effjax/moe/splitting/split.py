"""Splitting: the hidden units of a dense model's MLPs become the experts of a mixture.

MoEfication (Zhang et al., arXiv 2110.01786) and LLaMA-MoE (Zhu et al., arXiv 2406.16554). An MLP is
a sum over its hidden units, so experts that have each unit once are together the MLP.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.known import check_ids, number
from effjax.core.typing import Key, Number, Params, PyTree, Size
from effjax.core.weights import is_weight
from effjax.layers import MLP, LayerSpec, TransformerConfig
from effjax.layers.stack import change
from effjax.moe.layer import MoE
from effjax.moe.splitting.ways import Parts, Random, Way
from effjax.moe.units import Site, chosen_ffns, part, parts, router_of


def split_ffn(
  config: TransformerConfig,
  params: Params,
  key: Key,
  *,
  by: Way = Random(),
  experts: Size = 8,
  top_k: Size = 2,
  scale: Number | None = None,
  layers: Sequence[int] | None = None,
  load_balance: Number = 0.01,
  z: Number = 0.001,
  stddev: Number = 0.02,
) -> tuple[TransformerConfig, dict]:
  """The model with the MLPs of `layers` replaced by mixtures of their own hidden units.

  y = shared(x) + Σ_e gate_e(x) · expert_e(x), the gates of the top k summing to `scale`. With all
  gates one, and a way that gives each unit to one expert or to those that are shared, y is what the
  MLP gives: so it is at first with `top_k` and `scale` equal to `experts` and `stddev` 0. A bias of
  the outputs is divided among the experts, or with the shared units where there are any.

  Args:
    config: the dense model.
    params: its parameters, in representations that hold hidden units apart.
    key: PRNG key of the routers, and of what the way draws.
    by: which unit goes where: `Random()`, `Clusters()`, `Graph(…)`, `Important(…)`, and
      `Residual(…)` over one of them; or `SharingInner(…)`, whose experts are not the MLP.
    experts: number of experts E.
    top_k: experts a token visits.
    scale: what the gates of a token sum to. None is `experts`: each is then E / k on average, and
      the k experts stand for all. LLaMA-MoE has 8, and in its published models 4, for 2 of 8.
    layers: indices of the layers to change, negative ones from the end; None means every layer
      whose ffn is an `MLP`.
    load_balance, z: coefficients of the losses, see `TopK`.
    stddev: of the routers' normal distribution.

  Returns:
    The new configuration, without a published layout to save to, and its parameters.

  Raises:
    ValueError: when a layer does not exist or its ffn is not an `MLP`; for numbers out of range,
      experts that do not divide the units, and statistics that lack a layer; for a representation
      that does not hold hidden units apart, by name.

  Example:
    >>> config = TransformerConfig(8, 4, (LayerSpec(mixer=None, ffn=MLP(6)),))
    >>> ffn = {"up": {"kernel": jnp.ones((4, 6))}, "down": {"kernel": jnp.ones((6, 4))}}
    >>> params = {"segments_0": {"layers_0": {"ffn": ffn}}}
    >>> moe, params = split_ffn(config, params, jax.random.key(0), experts=3, top_k=1)
    >>> params["segments_0"]["layers_0"]["ffn"]["experts"]["up"]["kernel"].shape
    (3, 4, 2)
  """
  scale = experts if scale is None else number("scale", scale, of="split_ffn")
  router = router_of("split_ffn", experts, top_k, load_balance=load_balance, z=z, scale=scale)
  stddev = number("stddev", stddev, of="split_ffn", least=0)
  chosen = chosen_ffns("split_ffn", config, layers, MLP)
  keys = dict(zip(chosen, jax.random.split(key, len(chosen)), strict=True))

  def of_layer(index: int, spec: LayerSpec, tree: PyTree) -> tuple[LayerSpec, PyTree]:
    if index not in chosen:
      return spec, tree
    site = Site.of(config, index, spec, tree)
    own, drawn = jax.random.split(keys[index])
    try:
      found = by(site, np.arange(site.mlp.width), experts, drawn)
      _check(found, experts, site.mlp.width)
      ffn = _split(site, found)
    except ValueError as error:
      raise ValueError(f"split_ffn: layer {index}: {error}") from error
    width = site.params["up"]["kernel"].shape[0]
    ffn["router"] = {"kernel": stddev * jax.random.normal(own, (width, experts), jnp.float32)}
    of = lambda units: site.mlp.clone(width=units.shape[-1])
    shared = None if found.shared is None else of(found.shared)
    layer = MoE(router, of(found.experts), shared)
    return dataclasses.replace(spec, ffn=layer), {**tree, "ffn": ffn}

  changed, params = change(config, params, of_layer)
  return dataclasses.replace(changed, family=None), params


def _check(found: Parts, experts: Size, units: Size) -> None:
  """Refuses what a way must not give."""
  shape = tuple(found.experts.shape)
  if len(shape) != 2 or shape[0] != experts or not shape[1]:
    raise ValueError(f"by gives experts {shape}; allowed: {(experts, 'n')}, units of each expert")
  for name, ids in (("experts", found.experts), ("shared", found.shared)):
    if ids is not None:
      check_ids(f"by gives {name}", ids, units)


def _split(site: Site, found: Parts) -> dict[str, Any]:
  """The parameters of the experts and of what is shared."""
  ffn = {"experts": parts(site.mlp, site.params, found.experts)}
  if found.shared is not None:
    ffn["shared"] = part(site.mlp, site.params, found.shared)
  if site.mlp.use_bias:
    bias = site.params["down"]["bias"]
    if is_weight(bias):
      raise ValueError(f"down/bias is {bias!r}; allowed: plain arrays")
    share = 0 if found.shared is not None else 1 / len(found.experts)
    each = jnp.broadcast_to(bias * jnp.asarray(share, bias.dtype), (len(found.experts), len(bias)))
    ffn["experts"]["down"] = {**ffn["experts"]["down"], "bias": each}
  return ffn
