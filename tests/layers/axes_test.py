"""Roles have the paths, ranks and sizes of the parameters that a model makes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from effjax.attention import (
  LSRA,
  Attention,
  BigBird,
  LinearAttention,
  Linformer,
  Longformer,
  ShiftedSparseAttention,
)
from effjax.core import trees
from effjax.layers import MLP, LayerNorm, LayerSpec, TransformerConfig, axes
from effjax.layers.axes import ROLES
from effjax.layers.stack import places
from effjax.models import Transformer, presets
from effjax.models.families import opt
from effjax.moe import MoE, TopK

D, V = 24, 40
ATTENTION = Attention(4, kv_heads=2, head_width=8)
GATED = MLP(36, "silu", gated=True)


def config_of(*layers, **changes):
  return TransformerConfig(V, D, layers, **{"context": 16, **changes})


CONFIGS = {
  "tiny": presets.TINY,
  "sandwich": config_of(
    *(LayerSpec(ATTENTION.clone(qk_norm=1e-6), GATED), LayerSpec(ATTENTION, GATED)) * 2,
    arrangement="sandwich",
  ),
  "joint": config_of(LayerSpec(ATTENTION.clone(qk_norm=1e-6, qk_norm_joint=True), GATED)),
  "opt": opt.to_config(
    {
      "vocab_size": V,
      "hidden_size": D,
      "ffn_dim": 36,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "max_position_embeddings": 16,
      "word_embed_proj_dim": 12,
      "do_layer_norm_before": False,
    }
  ),
  "bert": config_of(
    *[LayerSpec(Attention(4, use_bias=True, out_bias=True), MLP(36, use_bias=True))] * 2,
    norm=LayerNorm(),
    arrangement="post",
    final_norm=False,
    positions="learned",
    token_types=2,
    embed_norm=True,
    head=None,
  ),
  "moe": config_of(
    LayerSpec(ATTENTION, MoE(TopK(3, 2), MLP(20, gated=True))),
    *[LayerSpec(None, MoE(TopK(3, 1), MLP(20, use_bias=True), MLP(40, use_bias=True)))] * 2,
    positions="sinusoidal",
  ),
  "untied": config_of(LayerSpec(Attention(4, sinks=True), None), tied=False, embed_width=12),
  "headless": config_of(LayerSpec(ATTENTION, GATED), embed_width=12, head=None),
  "places": config_of(*[LayerSpec(ATTENTION, GATED, None, MLP(6), MLP(4))] * 2),
  "tags": config_of(*[LayerSpec(ATTENTION, GATED, tag=tag) for tag in "aab"]),
  "unscanned": config_of(*[LayerSpec(ATTENTION, GATED)] * 2, scan=False),
  **{
    name: config_of(LayerSpec(mixer, MLP(36)))
    for name, mixer in {
      "lsra": LSRA(3, 5),
      "dynamic": LSRA(3, 5, dynamic=True),
      "linear": LinearAttention(4),
      "linformer": Linformer(4, 16, 5),
      "shared": Linformer(4, 16, 5, shared=True),
      "longformer": Longformer(4, kv_heads=2, positions=1, use_bias=True, sinks=True),
      "windowed": Longformer(4, positions=0),
      "bigbird": BigBird(4, block=4),
      "longlora": ShiftedSparseAttention(4, use_bias=True),
    }.items()
  },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_roles_are_those_of_the_parameters(name):
  config = CONFIGS[name]
  init = Transformer(config).init
  params = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  shapes, roles = {p: x.shape for p, x in trees.items(params).items()}, axes(config)
  assert roles.keys() == shapes.keys()
  sizes: dict = {}
  for path, shape in shapes.items():
    assert len(roles[path]) == len(shape), path
    assert set(roles[path]) <= set(ROLES), path
    for role, size in zip(roles[path], shape, strict=True):
      sizes.setdefault((place_of(path, role), role), set()).add(size)
  units = units_of(config)
  for (place, role), found in sizes.items():
    if role in units.get(place, {}):
      assert all(size % units[place][role] == 0 for size in found), (place, role)
    else:
      assert len(found) == 1, (place, role, found)


def place_of(path, role):
  """Where a role is one axis: the model, a segment, or a place of a layer."""
  parts = path.split("/")
  if role in ("embed", "vocab", "table") or parts[0][:9] != "segments_":
    return "model"
  return parts[0] if role == "layers" else "/".join(parts[:3])


def units_of(config):
  found = {}
  for (segment, name, _), spec in zip(places(config), config.layers, strict=True):
    for place, module in spec.modules.items():
      found[f"{segment}/{name}/{place}"] = getattr(module, "units", {})
  return found


def test_known_roles():
  roles = axes(CONFIGS["moe"])
  ffn = "segments_1/layers_0/ffn"
  assert roles[f"{ffn}/experts/down/kernel"] == ("layers", "experts", "hidden", "embed")
  assert roles[f"{ffn}/router/kernel"] == ("layers", "embed", "experts")
  assert roles[f"{ffn}/shared/up/bias"] == ("layers", "shared_hidden")
  assert roles["segments_0/layers_0/mixer/key/kernel"] == ("embed", "kv_heads")
  assert roles["final_norm/scale"] == ("embed",)
  assert axes(CONFIGS["untied"])["head/kernel"] == ("table", "vocab")
  assert axes(CONFIGS["bert"])["token_types/embedding"] == ("token_types", "embed")


class Halve(nn.Module):
  def __call__(self, x, context=None):
    return x / 2


def test_a_module_that_states_no_axes_is_named():
  layers = (LayerSpec(ATTENTION, GATED), LayerSpec(ATTENTION, GATED, after_ffn=Halve()))
  with pytest.raises(ValueError, match=r"layer 1: after_ffn is Halve; allowed: .* have `axes`"):
    axes(config_of(*layers))
  with pytest.raises(ValueError, match="norm is Halve"):
    axes(dataclasses.replace(CONFIGS["tiny"], norm=Halve()))
