"""Segments cover the layers in order; split and join are inverse to one another."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.attention import Attention
from effjax.core.register import register
from effjax.layers import MLP, LayerSpec, TransformerConfig, stack
from effjax.models import Transformer
from effjax.peft import lora
from effjax.quant import Int8
from tests.modules import apply, random_params

WIDTHS = (16, 24, 32)
TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def config_of(widths, **changes):
  layers = tuple(LayerSpec(Attention(2), MLP(WIDTHS[w])) for w in widths)
  return TransformerConfig(11, 8, layers, **changes)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=24))
def test_segments_spell_out_the_layers(widths):
  config = config_of(widths)
  spelled = [layer for s in stack.segments(config) for layer in s.pattern * s.repeats]
  assert tuple(spelled) == config.layers


@pytest.mark.parametrize(
  ("widths", "expected"),
  [
    ([0] * 30, [(1, 30)]),
    ([0, 0, 0, 0, 0, 1] * 3, [(6, 3)]),
    ([0, 0, 0, 0, 0, 1] * 4 + [0, 0], [(6, 4), (1, 2)]),
    ([1] + [0] * 5, [(1, 1), (1, 5)]),
    ([0, 1] * 4, [(2, 4)]),
    ([2], [(1, 1)]),
  ],
)
def test_segments_of_known_patterns(widths, expected):
  found = [(len(s.pattern), s.repeats) for s in stack.segments(config_of(widths))]
  assert found == expected


@pytest.mark.parametrize("widths", [[0, 0, 0], [0, 1, 0, 1, 2], [2, 0, 0]])
def test_split_and_join_are_inverse(widths):
  config = config_of(widths)
  params = random_params(Transformer(config), TOKENS)
  layers, rest = stack.split(config, params)
  assert [t["ffn"]["up"]["kernel"].shape[1] for t in layers] == [WIDTHS[w] for w in widths]
  chex.assert_trees_all_equal(stack.join(config, layers, rest), params)


def test_join_into_another_configuration_moves_layers():
  config = config_of([0, 0, 0])
  params = random_params(Transformer(config), TOKENS)
  layers, rest = stack.split(config, params)
  shorter = dataclasses.replace(config, layers=config.layers[:2])
  joined = stack.join(shorter, [layers[2], layers[0]], rest)
  again, _ = stack.split(shorter, joined)
  chex.assert_trees_all_equal(again[0], layers[2])


def test_join_refuses_another_number_of_layers(key):
  config = config_of([0, 0])
  with pytest.raises(ValueError, match="1 layer trees; allowed: 2"):
    stack.join(config, [{}], {})


def adapted(rank):
  w = jnp.ones((8, 16))
  return {"ffn": {"up": {"kernel": lora.init(w, jax.random.key(0), rank=rank, scale=1.0)}}}


@register(static=("bits",))
class Rounded(Int8):
  bits: int = 8


def rounded(bits):
  found = Int8.quantize(jnp.ones((8, 16)))
  return {"ffn": {"up": {"kernel": Rounded(found.q, found.scale, bits)}}}


@pytest.mark.parametrize(
  ("first", "second", "found"),
  [
    (adapted(1), adapted(2), r"ffn/up/kernel is LoRA.*\(8, 1\).*in the one, LoRA.*\(8, 2\)"),
    (rounded(4), rounded(8), r"ffn/up/kernel is Rounded.*bits=4.*in the one, .*bits=8"),
    (adapted(1), rounded(8), "ffn/up/kernel is LoRA.* in the one, Rounded"),
    ({"a": jnp.ones(2)}, {"a": jnp.ones(3)}, r"a is float32 \(2,\) .*, float32 \(3,\)"),
    ({"a": jnp.ones(2)}, {"a": jnp.ones(2, jnp.bfloat16)}, r"a is float32 .*, bfloat16 \(2,\)"),
    (
      {"a": jnp.ones(2)},
      {"b": jnp.ones(2)},
      r"a is float32 \(2,\) in the one, absent in the other",
    ),
  ],
)
def test_layers_that_do_not_stack_are_named(first, second, found):
  config = config_of([0, 1, 0, 1, 0, 1])
  with pytest.raises(ValueError, match=f"layers 1 and 5 are scanned together, and {found}.*tag"):
    stack.join(config, [first, first, first, first, first, second], {})


def test_layers_of_different_tags_are_not_scanned_together(key):
  config = config_of([0, 0, 0, 0])
  params = random_params(Transformer(config), TOKENS)

  def adapt(index, spec, tree):
    rank = 1 + index // 2
    kernel = lora.init(tree["ffn"]["up"]["kernel"], key, rank=rank, scale=1.0)
    spec = dataclasses.replace(spec, tag=rank)
    return spec, {**tree, "ffn": {**tree["ffn"], "up": {"kernel": kernel}}}

  changed, new = stack.change(config, params, adapt)
  assert [(len(s.pattern), s.repeats) for s in stack.segments(changed)] == [(1, 2), (1, 2)]
  ranks = [new[f"segments_{i}"]["layers_0"]["ffn"]["up"]["kernel"].rank for i in range(2)]
  assert ranks == [1, 2]
  chex.assert_trees_all_close(
    apply(Transformer(changed), new, TOKENS),
    apply(Transformer(config), params, TOKENS),
    atol=1e-5,
  )


def test_change_moves_layers_and_keeps_the_rest():
  config = config_of([0, 1, 2])
  params = random_params(Transformer(config), TOKENS)
  specs, (layers, rest) = config.layers, stack.split(config, params)
  backwards = lambda index, spec, tree: (specs[2 - index], layers[2 - index])
  turned, new = stack.change(config, params, backwards)
  assert turned.layers == specs[::-1]
  chex.assert_trees_all_equal(stack.split(turned, new), (layers[::-1], rest))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"after_mixer": MLP(2)}, "after_mixer is MLP and mixer None; allowed: nothing after"),
    ({"after_ffn": MLP(2)}, "after_ffn is MLP and ffn None"),
  ],
)
def test_specifications_that_mean_nothing_are_refused(fields, message):
  with pytest.raises(ValueError, match=f"LayerSpec: {message}"):
    LayerSpec(None, None, **fields)


def test_unscan_computes_the_same():
  config = config_of([0, 1, 0, 1])
  module = Transformer(config)
  params = random_params(module, TOKENS)
  flat, unstacked = stack.unscan(config, params)
  assert unstacked["segments_3"]["layers_0"]["ffn"]["up"]["kernel"].ndim == 2
  chex.assert_trees_all_close(
    apply(Transformer(flat), unstacked, TOKENS),
    apply(module, params, TOKENS),
    atol=1e-5,
  )
