"""Experts split over an axis of the mesh: eight devices do what one does, E / S experts each."""

import functools
import re

import chex
import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from effjax.core import spmd, trees
from effjax.layers import MLP, LayerSpec, TransformerConfig
from effjax.layers.axes import axes
from effjax.models import Transformer
from effjax.moe import MoE, TopK
from effjax.parallel import Experts, Zero, make_mesh, place
from effjax.train import init_state, make_train_step, next_token
from tests.modules import normal, random_params
from tests.parallel.experts_test import adapted_in_int8, assert_same, draw, plain

DEVICES = E = 8
WIDTH, HIDDEN = 16, 24
MOE = MoE(TopK(E, 2), MLP(HIDDEN, "silu", gated=True, use_bias=True))
CONFIG = TransformerConfig(40, WIDTH, (LayerSpec(None, MOE),) * 2)
OPTIMIZER = optax.sgd(1.0, momentum=0.9)
X = normal(8, 2, WIDTH)


@functools.cache
def train(sizes, change=plain):
  """(metrics, state after a step of ZeRO-3, compiled text); on one device without sizes."""
  batch, module = draw(), Transformer(CONFIG)
  init = jax.jit(lambda key: change(module.init(key, batch["tokens"])["params"]))
  state, placement = init_state(init(jax.random.key(0)), OPTIMIZER), None
  if sizes is not None:
    experts = Experts(axes(CONFIG))
    mesh = make_mesh(data=sizes[0], expert=sizes[1])
    placement = Zero(mesh, 3, experts=experts)
    state = place(state, mesh, zero=3, experts=experts)
    batch = jax.device_put(batch, placement.batch(batch))
  step = make_train_step(next_token(module), OPTIMIZER, placement=placement)
  program = step.lower(state, batch, jax.random.key(1)).compile()
  state, metrics = program(step.objective, state, batch, jax.random.key(1))
  return metrics, state, program.as_text()


def params(result):
  return result[0], result[1].params


def test_devices_with_experts_of_their_own_train_as_one_does():
  sizes = 1, DEVICES
  got, alone = train(sizes), train(None)
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
  got, alone = (train(sizes, adapted_in_int8) for sizes in ((2, 4), None))
  assert_same(params(got), params(alone))
  kernel = trees.items(got[1].params)["segments_0/layers_0/ffn/experts/up/kernel"]
  assert {x.addressable_shards[0].data.shape[1] for x in jax.tree.leaves(kernel)} == {E // 4}


def test_on_explicit_meshes_they_stay_where_they_are():
  params = random_params(MOE, X)
  run = lambda params, x: (MOE.apply({"params": params}, x) ** 2).sum()
  expected = jax.jit(jax.grad(run))(params, X)
  mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Explicit,) * 2)
  put = lambda tree, *spec: jax.device_put(tree, jax.NamedSharding(mesh, PartitionSpec(*spec)))
  rows = ("data", "expert")
  split = {"router": put(params["router"]), "experts": put(params["experts"], "expert")}
  with jax.set_mesh(mesh), spmd.rows_split(mesh, rows, spmd.Dealt("expert")):
    program = jax.jit(jax.grad(run)).lower(split, put(X, rows)).compile()
    chex.assert_trees_all_close(program(split, put(X, rows)), expected, rtol=1e-5, atol=1e-5)
  assert f"[{E // 4},{WIDTH},{HIDDEN}]" in program.as_text()
  assert f"[{E},{WIDTH},{HIDDEN}]" not in program.as_text()


ROLES = {
  "experts/up/kernel": ("experts", "embed", "hidden"),
  "router/kernel": ("embed", "experts"),
  "router/bias": ("experts",),
}


def zero(stage=0, roles=ROLES, **sizes):
  return Zero(make_mesh(**sizes), stage, experts=Experts(roles))


def arrays(experts):
  shapes = {"experts": {"up": {"kernel": (experts, 6, 8)}}, "router": {"kernel": (6, experts)}}
  return jax.tree.map(np.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))


def test_experts_are_split_over_theirs_and_all_else_over_both_axes():
  spec = lambda stage, tree: jax.tree.map(
    lambda sharding: tuple(sharding.spec), zero(stage, data=2, expert=4).params(tree)
  )
  assert spec(0, arrays(8))["experts"]["up"]["kernel"] == ("expert",)
  assert spec(3, arrays(8))["experts"]["up"]["kernel"] == ("expert", None, "data")
  assert spec(3, arrays(8))["router"]["kernel"] == (None, ("data", "expert"))
  with pytest.raises(ValueError, match=r"experts/up/kernel has 6 experts; .* expert=4"):
    spec(3, arrays(6))
  with pytest.raises(ValueError, match=r"roles of experts/up/kernel; allowed: of params"):
    spec(3, {"up": np.zeros((8, 6, 8))})


def test_wrong_arguments_are_named():
  with pytest.raises(ValueError, match=r"axes \('data',\); ZeRO needs 'expert'"):
    zero(data=8)
  with pytest.raises(ValueError, match=r"batch of 12 rows; .* data=2 · expert=4"):
    zero(data=2, expert=4).batch({"tokens": np.zeros((12, 4))})
  with pytest.raises(ValueError, match=r"roles of 1 parameters; allowed: some with experts"):
    Experts({"router/kernel": ("embed", "experts")})
  with pytest.raises(ValueError, match=r"experts over 'data'; allowed: the last of"):
    spmd.rows_split(make_mesh(data=2, expert=4), ["data", "expert"], spmd.Dealt("data"))


def test_they_may_be_split_over_the_data_axis_itself():
  placement = Zero(make_mesh(data=8), 3, experts=Experts(ROLES, axis="data"))
  specs = jax.tree.map(lambda sharding: tuple(sharding.spec), placement.params(arrays(8)))
  assert specs["experts"]["up"]["kernel"] == ("data",)
  assert specs["router"]["kernel"] == (None, "data")
