import jax
import jax.numpy as jnp

from effjax.core import trees
from effjax.cost import active_parameters, parameters, state_bytes, trainable
from effjax.layers import MLP
from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.models import Transformer, presets
from effjax.moe import MoE, TopK
from effjax.peft import lora
from effjax.quant.int8 import Int8


def shapes(config):
  init = Transformer(config).init
  return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def test_dense_model_uses_all_its_parameters():
  params = shapes(presets.SMOLLM2_135M)
  assert parameters(params) == 134_515_008  # its published size
  assert active_parameters(presets.SMOLLM2_135M, params) == 134_515_008


def test_mixture_counts_only_chosen_experts():
  ffn = MoE(TopK(experts=8, top_k=2), MLP(16))
  config = TransformerConfig(32, 12, (LayerSpec(None, ffn),) * 3)
  params = shapes(config)
  expert = sum(
    leaf.size // 8
    for path, leaf in trees.items(params).items()
    if leaf.ndim > 2 and leaf.shape[1] == 8
  )
  saved = parameters(params) - active_parameters(config, params)
  assert expert > 0
  assert saved == 6 * expert


def test_trainable_and_bytes_see_inside_weights():
  params = {"kernel": Int8.quantize(jnp.ones((64, 32)))}
  assert parameters(params) == 64 * 32
  assert state_bytes(params) == 64 * 32 + 32 * 4
  params = lora.add(params, jax.random.key(0), rank=2, targets="kernel")
  chosen, frozen = trees.partition(params, "/(a|b)$")
  assert trainable(chosen) == 2 * (64 + 32)
  assert state_bytes(chosen, frozen) == state_bytes(params)
