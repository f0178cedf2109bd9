import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.attention import Attention
from effjax.core import trees
from effjax.layers import MLP, RMSNorm, Rope
from effjax.models import LayerSpec, Transformer, TransformerConfig
from effjax.parallel import Zero, make_mesh, place
from effjax.train import init_state, make_train_step, next_token

N = 8
LAYER = LayerSpec(Attention(4, kv_heads=2, rope=Rope(1e4)), MLP(64, "silu", gated=True))
CONFIG = TransformerConfig(64, 32, (LAYER,) * 3, norm=RMSNorm(1e-5), context=16)


@pytest.fixture(scope="module")
def training():
  """(objective, optimizer, params, batch) of a small scanned Transformer."""
  module = Transformer(CONFIG)
  draw = np.random.default_rng(0)
  tokens = jax.device_put(draw.integers(0, 64, (16, 9)).astype(jnp.int32))
  weights = jax.device_put(draw.integers(0, 2, (16, 8)).astype(jnp.float32))
  batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
  params = jax.jit(module.init)(jax.random.key(0), batch["tokens"])["params"]
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  return next_token(module), optimizer, jax.tree.map(np.asarray, params), batch


def _train(training, stage, microbatches=1, steps=2):
  objective, optimizer, params, batch = training
  state = init_state(jax.device_put(params), optimizer)
  placement = None
  if stage is not None:
    placement = Zero(make_mesh(data=N), stage)
    state = place(state, placement.mesh, zero=stage)
    batch = jax.device_put(batch, placement.batch(batch))
  step = make_train_step(objective, optimizer, microbatches=microbatches, placement=placement)
  program = step.lower(state, batch, jax.random.key(1)).compile()
  losses = []
  for _ in range(steps):
    state, metrics = program(step.objective, state, batch, jax.random.key(1))
    losses.append(float(metrics["loss"]))
  return state, losses, program.as_text()


@pytest.fixture(scope="module")
def alone(training):
  return _train(training, None)


def _bytes_on(device, tree):
  shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device]
  return sum(shard.data.nbytes for shard in shards)


@pytest.mark.slow
@pytest.mark.parametrize("stage, microbatches", [(0, 1), (1, 1), (2, 2), (3, 1), (3, 2)])
def test_a_stage_trains_as_one_device_does(training, alone, stage, microbatches):
  state, losses, text = _train(training, stage, microbatches)
  np.testing.assert_allclose(losses, alone[1], rtol=1e-5)
  for path, x in trees.items(state.params).items():
    np.testing.assert_allclose(x, trees.items(alone[0].params)[path], atol=1e-5, err_msg=path)
  for device in jax.devices():
    held = _bytes_on(device, state.params), _bytes_on(device, state.opt_state[1][0].mu)
    whole = trees.nbytes(state.params)
    assert held == (whole // (N if stage >= 3 else 1), whole // (N if stage >= 1 else 1))
  assert re.search(r"all-reduce|reduce-scatter", text)
  assert bool(re.search(r"all-gather", text)) == (stage >= 1)
  _assert_only_parameters_travel(text, training[2])


def _assert_only_parameters_travel(text, params):
  """Every collective's result is shaped as a parameter, a layer of one, or a scalar."""
  form = lambda shape: tuple(sorted(size for size in shape if size > 1))
  shapes = [x.shape for x in jax.tree.leaves(params)]
  allowed = {form(shape) for shape in shapes} | {form(shape[1:]) for shape in shapes} | {()}
  pattern = r"= (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
  for result in re.findall(pattern, text):
    for sizes in re.findall(r"\[([\d,]*)\]", result):
      assert form(int(size) for size in sizes.split(",") if size) in allowed, result


@pytest.mark.parametrize("stage, parts", [(0, 1), (1, 1), (2, N), (3, N)])
def test_gradients_inside_the_step_are_split_from_stage_2(stage, parts):
  placement = Zero(make_mesh(data=N), stage)
  grads = jax.jit(placement.on_gradients)({"w": jnp.ones((16, 24))})
  assert grads["w"].addressable_shards[0].data.size == 16 * 24 // parts


@pytest.mark.parametrize(
  "shape, shard",
  [((24, 16), (3, 16)), ((16, 16), (16, 2)), ((3, 8, 5), (3, 1, 5)), ((7, 9), (7, 9)), ((), ())],
)
def test_the_longest_axis_that_divides_is_split(shape, shard):
  split = Zero(make_mesh(data=N), 3).shards.split(np.zeros(shape))
  assert split.shard_shape(shape) == shard


def test_wrong_arguments_are_named():
  with pytest.raises(ValueError, match=r"zero=4; allowed: 0, 1, 2, 3"):
    Zero(make_mesh(data=N), 4)
  with pytest.raises(ValueError, match="ZeRO needs 'data'"):
    Zero(make_mesh(model=N), 3)
  with pytest.raises(ValueError, match=r"batch of 12 rows; allowed: multiples of data=8"):
    Zero(make_mesh(data=N), 0).batch({"tokens": np.zeros((12, 4))})


def test_a_mesh_of_explicit_axes_is_refused_by_name():
  with pytest.raises(ValueError, match=r"its axis 'data' is .*; allowed: AxisType\.Auto"):
    Zero(jax.make_mesh((2,), ("data",)))


def _state(width):
  params = {"embed": jnp.zeros((61, width)), "up": jnp.zeros((3, width, width)), "b": jnp.zeros(5)}
  return init_state(params, optax.adam(1e-3))


@pytest.mark.parametrize("stage, arrays", [(1, "1 of 7|0 of 7"), (3, "0 of 10")])
def test_what_cannot_be_split_is_said(stage, arrays):
  words = rf"zero={stage} splits ({arrays}) arrays over data=8: .* bytes stay whole.*\(61, 36\)"
  with pytest.warns(UserWarning, match=words):
    place(_state(36), make_mesh(data=N), zero=stage)


@pytest.mark.parametrize("width, stage, devices", [(64, 3, N), (36, 0, N), (36, 3, 1)])
def test_where_all_of_size_is_split_nothing_is_said(width, stage, devices, recwarn):
  place(_state(width), make_mesh(data=devices), zero=stage)
  assert not recwarn.list
