"""Experts split over an axis of the mesh: eight devices do what one does, E / S experts each."""

import functools
import re

import jax
import optax
import pytest

from effjax.core import trees
from effjax.layers import MLP, LayerSpec, TransformerConfig
from effjax.layers.axes import axes
from effjax.models import Transformer
from effjax.moe import MoE, TopK
from effjax.parallel import Experts, Zero, make_mesh, place
from effjax.train import init_state, make_train_step, next_token
from tests.parallel.experts_test import adapted_in_int8, assert_same, draw, plain

E, WIDTH, HIDDEN = 8, 16, 24
MOE = MoE(TopK(E, 2), MLP(HIDDEN, "silu", gated=True, use_bias=True))
CONFIG = TransformerConfig(40, WIDTH, (LayerSpec(None, MOE),) * 2)
OPTIMIZER = optax.sgd(1.0, momentum=0.9)


@functools.cache
def train(sizes, zero, change=plain, room=None):
  """(metrics, state after a step, compiled text), on one device where there are no sizes."""
  batch, module = draw(), Transformer(CONFIG)
  init = jax.jit(lambda key: change(module.init(key, batch["tokens"])["params"]))
  state, placement = init_state(init(jax.random.key(0)), OPTIMIZER), None
  if sizes is not None:
    experts = Experts(axes(CONFIG), room=room)
    mesh = make_mesh(data=sizes[0], expert=sizes[1])
    placement = Zero(mesh, zero, experts=experts)
    state = place(state, mesh, zero=zero, experts=experts)
    batch = jax.device_put(batch, placement.batch(batch))
  step = make_train_step(next_token(module), OPTIMIZER, placement=placement)
  program = step.lower(state, batch, jax.random.key(1)).compile()
  state, metrics = program(step.objective, state, batch, jax.random.key(1))
  return metrics, state, program.as_text()


def params(result):
  return result[0], result[1].params


@pytest.mark.parametrize("sizes, zero", [((1, 8), 3), ((2, 4), 3), ((4, 2), 0)])
def test_devices_with_experts_of_their_own_train_as_one_does(sizes, zero):
  got, alone = train(sizes, zero), train(None, 0)
  assert_same(params(got), params(alone))
  assert not re.search(rf"\[2,{E},{WIDTH},{HIDDEN}\]|\[{E},{WIDTH},{HIDDEN}\]", got[2])
  assert f"[{E // sizes[1]},{WIDTH},{HIDDEN}]" in got[2]
  assert re.search(r"all-to-all\(", got[2]) and not re.search(r"all-to-all\(", alone[2])
  assert "exchange_dropped" not in got[0]
  for tree in (got[1].params, got[1].opt_state[0].trace):
    for path, x in trees.items(tree).items():
      if "experts" in path:
        first = {shard.index[1].start or 0 for shard in x.addressable_shards}
        assert len(first) == sizes[1], path
        assert {shard.data.shape[1] for shard in x.addressable_shards} == {E // sizes[1]}, path


def test_adapters_over_experts_in_int8():
  got, alone = (train(sizes, 3, adapted_in_int8) for sizes in ((2, 4), None))
  assert_same(params(got), params(alone))
  kernel = trees.items(got[1].params)["segments_0/layers_0/ffn/experts/up/kernel"]
  assert {x.addressable_shards[0].data.shape[1] for x in jax.tree.leaves(kernel)} == {E // 4}
