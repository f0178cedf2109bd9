import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from effjax.attention import Attention, LinearAttention, masks
from effjax.cost import active_parameters, compiled, flops, sequence_flops
from effjax.layers import MLP, LayerSpec, TransformerConfig
from effjax.models import Transformer, presets
from effjax.moe import MoE, TopK
from effjax.peft import lora


def test_deepseek_figures():
  assert sequence_flops(4096, 30, 4096, 102_400) == pytest.approx(183.48e12, rel=5e-5)
  assert sequence_flops(4096, 28, 2048, 102_400, factor=20) == pytest.approx(74.42e12, rel=1e-4)


def test_layer_specs_agree_with_the_sequence_formula():
  # An FFN of 4·D makes a = 12; training is three forwards, here with scores over all keys.
  config = presets.OPT["125M"]
  length, layers, width = 512, 12, 768
  causal = sum(range(1, length + 1)) / length
  head = 2 * config.vocab_size * width
  forward = layers * (24 * width**2 + 4 * width * causal) + head
  assert flops(config, length) == pytest.approx(forward, rel=1e-6)
  published = sequence_flops(length, layers, width, config.vocab_size) / length
  discount = 3 * layers * 4 * width * (length - causal)
  assert published == pytest.approx(3 * forward + discount, rel=1e-6)


@pytest.mark.usefixtures("optimized")
def test_compiler_counts_the_same():
  config = dataclasses.replace(presets.TINY, layers=presets.TINY.layers[:1])
  module, length = Transformer(config), 64
  params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  found = compiled(lambda p, t: module.apply({"params": p}, t), params, tokens).flops
  # The compiler sees elementwise work too, and dense scores where the specs count visible keys.
  ours = flops(config, length) * length
  assert ours < found < 1.5 * ours


def test_bad_length():
  with pytest.raises(ValueError, match="length 0"):
    flops(presets.TINY, 0)


@pytest.mark.parametrize("queries", [0, 9])
def test_bad_queries(queries):
  with pytest.raises(ValueError, match=f"queries {queries}; allowed: 1 … 8"):
    flops(presets.TINY, 8, queries=queries)


class Silent(nn.Module):
  def __call__(self, x, context=None):
    return x


def test_a_module_without_flops_is_named():
  layers = (LayerSpec(None, MLP(8)), LayerSpec(None, MLP(8), after_ffn=Silent()))
  with pytest.raises(ValueError, match=r"layer 1: after_ffn is Silent; allowed: .*`flops`"):
    flops(TransformerConfig(16, 4, layers), 8)


def test_decoding_sees_the_keys_of_the_last_token():
  layers = (
    LayerSpec(Attention(2), MLP(8), after_ffn=MLP(3)),
    LayerSpec(Attention(2, mask=masks.SlidingWindow(3, 0)), None),
    LayerSpec(LinearAttention(2), None),
  )
  config = TransformerConfig(16, 4, layers)
  matrices = 3 * 8 * 4**2 + 4 * 4 * (8 + 3) + 2 * 4 * 16
  state = 4 * 4 * (1 + 2)  # the linear layer: one pair, and heads 2 wide taken in and read
  for length in (2, 50):
    scores = 4 * 4 * (length + min(4, length))
    assert flops(config, length, queries=1) == matrices + scores + state
  assert flops(config, 9, queries=9) == flops(config, 9)


def shapes(config):
  init = Transformer(config).init
  return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def adapted(config, targets, rank=2):
  add = lambda params: lora.add(params, jax.random.key(0), rank=rank, targets=targets)
  return jax.eval_shape(add, shapes(config))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(("top_k", "shared"), [(1, 0), (3, 0), (1, 2)])
def test_factors_of_experts_count_as_often_as_they_are_used(top_k, shared, scan):
  ffn = MoE(TopK(8, top_k), MLP(32), MLP(32 * shared) if shared else None)
  config = TransformerConfig(16, 8, (LayerSpec(None, ffn),) * 2, scan=scan)
  more = lambda params: flops(config, 5, params) - flops(config, 5)
  assert more(shapes(config)) == 0
  params = adapted(config, "experts/up/kernel")
  assert more(params) == 2 * top_k * (2 * 2 * (8 + 32))  # two layers, 160 for each expert
  assert active_parameters(config, params) - active_parameters(config, shapes(config)) == (
    2 * top_k * 2 * (8 + 32)
  )
  assert more(adapted(config, "router/kernel")) == 2 * 2 * 2 * (8 + 8)
  if shared:
    assert more(adapted(config, "shared/up")) == 2 * 2 * 2 * (8 + 32 * shared)


def test_tables_count_where_they_are_multiplied():
  layers = (LayerSpec(None, MLP(12)),)
  tied = TransformerConfig(16, 8, layers, positions="learned", context=20)
  untied, headless = (dataclasses.replace(tied, **x) for x in ({"tied": False}, {"head": None}))
  more = lambda config, path: flops(config, 5, adapted(config, path)) - flops(config, 5)
  assert more(tied, "^embed/") == 2 * 2 * (16 + 8)
  assert more(untied, "^embed/") == more(headless, "^embed/") == more(tied, "^positions/") == 0
  assert more(untied, "^head/") == 2 * 2 * (16 + 8)


def test_a_factor_on_a_factor_counts_both():
  config = TransformerConfig(16, 8, (LayerSpec(None, MLP(12)),))
  params = adapted(config, "ffn/up", rank=3)
  up = params["segments_0"]["layers_0"]["ffn"]["up"]
  wrap = lambda w: lora.init(w, jax.random.key(0), rank=1, scale=1.0)
  up["kernel"] = jax.eval_shape(wrap, up["kernel"])
  assert flops(config, 5, params) - flops(config, 5) == 2 * (3 + 1) * (8 + 12)
