"""A mixture of experts under data parallelism: each device computes its own rows."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core import trees
from effjax.layers import MLP, LayerSpec, TransformerConfig
from effjax.models import Transformer
from effjax.moe import MoE, TopK
from effjax.parallel import Zero, make_mesh, place
from effjax.peft import lora
from effjax.quant import quantize
from effjax.train import init_state, make_train_step, next_token

B, T, K = 16, 3, 2
SPEC = LayerSpec(None, MoE(TopK(4, K), MLP(24, "silu", gated=True, use_bias=True), MLP(8)))
MODULE = Transformer(TransformerConfig(40, 16, (SPEC,) * 2))
OPTIMIZER = optax.sgd(1.0)  # so that the change of a parameter is its gradient


def draw():
  tokens = np.random.default_rng(0).integers(0, 40, (B, T + 1))
  ids = np.zeros((B, T), int)
  ids[3, 1:] = -1
  return {
    "tokens": jax.device_put(tokens[:, :-1].astype(jnp.int32)),
    "targets": jax.device_put(tokens[:, 1:].astype(jnp.int32)),
    "segment_ids": jax.device_put(ids.astype(jnp.int32)),
    "weights": jax.device_put((ids == 0).astype(jnp.float32)),
  }


@functools.cache
def train(zero, change):
  """(metrics, parameters after a step, compiled text); on one device for `zero` None."""
  batch = draw()
  init = jax.jit(lambda key: change(MODULE.init(key, batch["tokens"])["params"]))
  params = init(jax.random.key(0))
  state, placement = init_state(params, OPTIMIZER), None
  if zero is not None:
    placement = Zero(make_mesh(data=8), zero)
    state = place(state, placement.mesh, zero=zero)
    batch = jax.device_put(batch, placement.batch(batch))
  step = make_train_step(next_token(MODULE), OPTIMIZER, placement=placement)
  program = step.lower(state, batch, jax.random.key(1)).compile()
  state, metrics = program(step.objective, state, batch, jax.random.key(1))
  return metrics, state.params, program.as_text()


def plain(params):
  return params


def adapted(params):
  params = lora.add(params, jax.random.key(1), rank=2, targets="experts/.*kernel")
  return trees.update(params, "experts/.*kernel", trained_for_a_while)


def trained_for_a_while(path, w):
  return lora.LoRA(w.base, w.a, jax.random.normal(jax.random.key(2), w.b.shape) / 10, w.scale)


def adapted_in_int8(params):
  return adapted(quantize(params, targets="experts/.*kernel"))


def assert_same(got, expected):
  for name in ("loss", "load_balance", "router_z", "max_load", "grad_norm"):
    np.testing.assert_allclose(got[0][name], expected[0][name], rtol=1e-5, err_msg=name)
  for path, x in trees.items(jax.device_get(got[1])).items():
    chex.assert_trees_all_close(x, trees.items(jax.device_get(expected[1]))[path], atol=1e-5)


@pytest.mark.parametrize("zero", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_eight_devices_train_as_one_does_and_compute_their_own_rows(zero):
  got, alone = train(zero, plain), train(None, plain)
  assert_same(got, alone)
  rows = B * T * K
  assert f"[{rows},16]" in alone[2]
  assert f"[{rows // 8},16]" in got[2]
  assert not re.search(rf"\[{rows},\d+\]|\[{B * T},\d+\]", got[2])


def test_adapters_over_experts_that_are_gathered():
  assert_same(train(3, adapted), train(None, adapted))


@pytest.mark.parametrize("zero", [0, 3])
def test_experts_in_int8_and_adapters_over_them(zero):
  assert_same(train(zero, adapted_in_int8), train(None, adapted_in_int8))
