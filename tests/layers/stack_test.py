"""Segments cover the layers in order; split and join are inverse to one another."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.attention import Attention
from effjax.layers import MLP, LayerSpec, TransformerConfig, stack
from effjax.models import Transformer

WIDTHS = (16, 24, 32)


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
def test_split_and_join_are_inverse(widths, key):
  config = config_of(widths)
  params = jax.jit(Transformer(config).init)(key, jnp.zeros((1, 3), int))["params"]
  layers, rest = stack.split(config, params)
  assert [t["ffn"]["up"]["kernel"].shape[1] for t in layers] == [WIDTHS[w] for w in widths]
  chex.assert_trees_all_equal(stack.join(config, layers, rest), params)


def test_join_into_another_configuration_moves_layers(key):
  config = config_of([0, 0, 0])
  params = jax.jit(Transformer(config).init)(key, jnp.zeros((1, 3), int))["params"]
  layers, rest = stack.split(config, params)
  shorter = dataclasses.replace(config, layers=config.layers[:2])
  joined = stack.join(shorter, [layers[2], layers[0]], rest)
  again, _ = stack.split(shorter, joined)
  chex.assert_trees_all_equal(again[0], layers[2])


def test_join_refuses_another_number_of_layers(key):
  config = config_of([0, 0])
  with pytest.raises(ValueError, match="1 layer trees; allowed: 2"):
    stack.join(config, [{}], {})


def test_unscan_computes_the_same(key):
  config = config_of([0, 1, 0, 1])
  tokens = jax.random.randint(key, (2, 5), 0, 11)
  module = Transformer(config)
  params = jax.jit(module.init)(key, tokens)["params"]
  flat, unstacked = stack.unscan(config, params)
  assert unstacked["segments_3"]["layers_0"]["ffn"]["up"]["kernel"].ndim == 2
  chex.assert_trees_all_close(
    Transformer(flat).apply({"params": unstacked}, tokens),
    module.apply({"params": params}, tokens),
    atol=1e-5,
  )
