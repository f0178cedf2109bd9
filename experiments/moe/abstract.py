"""Designs as real modules that are counted by their shapes, so that nothing is allocated."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax import cost
from effjax.attention import Attention, masks
from effjax.core import trees
from effjax.core.typing import Params, PyTree
from effjax.layers import MLP, LayerSpec, Router, TransformerConfig, weight
from effjax.layers.peeking import parts
from effjax.layers.spec import share
from effjax.layers.stack import split
from effjax.models import EncoderDecoder, Transformer
from effjax.moe import Gated, MoE, ResidualMoE, TopK
from experiments.moe.designs import Design

KINDS = {
  "ReLU": ("relu", False),
  "GELU": ("gelu", False),
  "GEGLU": ("gelu", True),
  "SwiGLU": ("silu", True),
}
TABLES = ("embed", "head")
STACKS = {1: ("",), 2: ("encoder", "decoder")}


class MambaShapes(nn.Module):
  """The parameters of Jamba's Mamba layer (arXiv 2403.19887), to be counted: it computes nothing.

  Of a width D: 2 D inner channels, a state of 16, 4 taps, Δ of rank ⌈D / 16⌉, norms of Δ, B and C.
  """

  @nn.compact
  def __call__(self, x, context=None, cache=None):
    width = x.shape[-1]
    inner, rank, state = 2 * width, -(-width // 16), 16
    shapes = {
      "in": (width, 2 * inner),
      "taps": (4, inner),
      "taps_bias": (inner,),
      "parts": (inner, rank + 2 * state),
      "step": (rank, inner),
      "step_bias": (inner,),
      "decay": (inner, state),
      "skip": (inner,),
      "norms": (rank + 2 * state,),
      "out": (inner, width),
    }
    for name, shape in shapes.items():
      weight(self, name, nn.initializers.zeros, shape)
    return x, cache

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward, without the scan's."""
    inner, rank = 2 * width, -(-width // 16)
    return 2.0 * (3 * width * inner + inner * (2 * rank + 32))


@dataclasses.dataclass(frozen=True)
class Counted:
  """Numbers of a design.

  Attributes:
    total, active: parameters, and those that a token uses.
    tables: those of token tables and head.
    experts, active_experts: those of experts alone, shared ones included.
    flops: of training on one sequence: three forwards, scores over all keys; of an encoder and a
      decoder, on one of as many tokens for each.
    router_flops: of which the routers'.
  """

  total: int
  active: int
  tables: int
  experts: int
  active_experts: int
  flops: float
  router_flops: float


@functools.cache
def count(design: Design, tokens: int) -> Counted:
  """The numbers of a design, FLOPs of training on one sequence of so many tokens."""
  stacks = configs(design)
  params = _shapes(stacks)
  routed = [_experts(config, params[stack]) for stack, config in stacks.items()]
  training = 3.0 * tokens
  return Counted(
    total=sum(map(cost.parameters, params.values())),
    active=sum(cost.active_parameters(stacks[stack], tree) for stack, tree in params.items()),
    tables=sum(trees.count(tree[n]) for tree in params.values() for n in TABLES if n in tree),
    experts=sum(total for total, _ in routed),
    active_experts=round(sum(active for _, active in routed)),
    flops=training * sum(cost.flops(config, tokens) for config in stacks.values()),
    router_flops=training * sum(map(_router_flops, stacks.values())),
  )


def configs(design: Design) -> dict[str, TransformerConfig]:
  """Stack → its configuration; a decoder alone has the name ""."""
  return {
    stack: TransformerConfig(
      design.vocab,
      design.width,
      _layers(design, stack == "decoder"),
      head=None if stack == "encoder" else "lm",
      tied=design.tied,
    )
    for stack in STACKS[design.stacks]
  }


def _layers(design: Design, crosses: bool) -> tuple[LayerSpec, ...]:
  attention = Attention(
    design.heads, kv_heads=design.kv_heads, head_width=design.head_width, mask=masks.Full()
  )
  cross = attention.clone(cross=True) if crosses else None
  dense, sparse = _mlp(design.ffn, design.activation), iter(_mixtures(design))
  layers = []
  for index in range(design.layers):
    mamba = design.mamba and index % design.mamba != design.mamba // 2
    mixer = MambaShapes() if mamba else attention
    is_sparse = (index + 1) % design.every == 0 and index >= design.first_dense
    layers.append(LayerSpec(mixer, next(sparse) if is_sparse else dense, cross))
    if is_sparse and design.extra:
      layers.append(LayerSpec(None, dense))
  return tuple(layers)


def _mixtures(design: Design) -> Iterator[nn.Module]:
  """The feed-forward layer of one sparse layer after the other."""
  pyramid = (
    design.experts if isinstance(design.experts, tuple) else ((design.layers, design.experts),)
  )
  expert = _mlp(design.expert, design.expert_activation or design.activation)
  always = design.shared if design.counted else 0
  choices = design.active - (design.shared if design.residual else always)
  shared: nn.Module | None = None
  if design.shared and not design.residual:
    shared = _mlp(design.shared * design.expert, design.activation)
    shared = Gated(shared) if design.gated else shared
  for layers, experts in pyramid:
    mixture = MoE(TopK(experts - always, choices), expert, shared)
    layer = ResidualMoE(mixture, expert) if design.residual else mixture
    yield from itertools.repeat(layer, layers)


def _mlp(width: int, activation: str) -> MLP:
  name, gated = KINDS[activation]
  return MLP(width, name, gated)


def _shapes(stacks: Mapping[str, TransformerConfig]) -> dict[str, Params]:
  """Stack → the shapes of its parameters."""
  key, tokens = jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32)
  if len(stacks) == 1:
    return {"": jax.eval_shape(Transformer(stacks[""]).init, key, tokens)["params"]}
  module = EncoderDecoder(stacks["encoder"], stacks["decoder"])
  return jax.eval_shape(module.init, key, tokens, tokens)["params"]


def _experts(config: TransformerConfig, params: Params) -> tuple[int, float]:
  """Parameters of experts, shared ones included, and those of them that a token uses."""
  found = [
    (trees.count(leaf), share(spec.modules, path))
    for spec, layer in zip(config.layers, _split(config, params), strict=True)
    for path, leaf in trees.items(layer).items()
    if re.search(r"(^|/)(experts|shared|mlp)/", path)
  ]
  return sum(size for size, _ in found), sum(size * used for size, used in found)


def _split(config: TransformerConfig, params: Params) -> list[PyTree]:
  return jax.eval_shape(lambda tree: split(config, tree)[0], params)


def _router_flops(config: TransformerConfig) -> float:
  """FLOPs a token of all routers."""
  modules = (module for spec in config.layers for module in spec.modules.values())
  routers = (part for module in modules for part in parts(module) if isinstance(part, Router))
  return sum(router.flops(config.width, 1) for router in routers)
