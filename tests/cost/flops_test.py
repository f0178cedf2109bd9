import dataclasses

import jax
import jax.numpy as jnp
import pytest

from effjax.cost import compiled, flops, sequence_flops
from effjax.models import Transformer, presets


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
