import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.train import OptimizerConfig, make_optimizer
from effjax.train.optimizer import matrices, schedule


def _params():
  return {"up": {"kernel": jnp.ones((3, 4, 5)), "bias": jnp.ones((3, 5))}, "norm": jnp.ones((3, 4))}


def test_schedule_is_optax_warm_up_and_cosine_moved_by_the_first_step():
  ours = schedule(OptimizerConfig(learning_rate=0.3, warmup=10, steps=50, final=0.1))
  peer = optax.warmup_cosine_decay_schedule(0.0, 0.3, 10, 50, 0.03)
  rise, fall = np.arange(9), np.arange(10, 60)
  np.testing.assert_allclose(jax.vmap(ours)(rise), jax.vmap(peer)(rise + 1), rtol=1e-6)
  np.testing.assert_allclose(jax.vmap(ours)(fall), jax.vmap(peer)(fall), rtol=1e-5)


def test_stacked_norms_and_biases_do_not_decay():
  assert matrices(_params()) == {"up": {"kernel": True, "bias": False}, "norm": False}


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_decay_without_gradient_is_rate_times_decay_times_weight(name):
  config = OptimizerConfig(name=name, learning_rate=0.5, warmup=0, steps=9, weight_decay=0.2)
  optimizer = make_optimizer(config)
  params = _params()
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
  np.testing.assert_allclose(updates["up"]["kernel"], -0.1, rtol=1e-6)
  np.testing.assert_array_equal(updates["norm"], 0.0)


def test_adamw_equals_torch(key):
  torch = pytest.importorskip(
    "torch", reason="compares with torch's AdamW; it is installed on 3.11"
  )
  config = OptimizerConfig(learning_rate=0.1, warmup=0, steps=10**9, weight_decay=0.1, clip=1.0)
  optimizer = make_optimizer(config)
  params = {"kernel": jax.random.normal(key, (4, 3))}
  peer = torch.nn.Parameter(torch.tensor(np.asarray(params["kernel"])))
  adamw = torch.optim.AdamW([peer], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
  state = optimizer.init(params)
  draw = np.random.default_rng(0)

  @jax.jit
  def step(grads, state, params):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for i in range(5):
    grad = draw.normal(size=(4, 3)).astype(np.float32) * (i + 0.1)
    params, state = step({"kernel": grad}, state, params)
    peer.grad = torch.tensor(grad)
    torch.nn.utils.clip_grad_norm_([peer], 1.0)
    adamw.step()
  np.testing.assert_allclose(params["kernel"], peer.detach().numpy(), rtol=2e-5, atol=2e-6)


def test_adafactor_holds_a_row_and_a_column_for_a_matrix():
  params = {"kernel": jnp.ones((256, 128))}
  state = make_optimizer(OptimizerConfig(name="adafactor")).init(params)
  assert sum(x.size for x in jax.tree.leaves(state)) < 256 + 128 + 10


def _updates(optimizer, grads, steps=3):
  """The last of some updates; gradients grow, so that clipping is at work."""
  state, update = optimizer.init(grads), jax.jit(optimizer.update)
  for i in range(steps):
    scaled = jax.tree.map(lambda x, i=i: x * 10**i, grads)
    updates, state = update(scaled, state, grads)
  return updates


def _draw(*shape):
  sizes = np.exp(np.random.default_rng(sum(shape)).normal(size=(*shape[:-2], 1, 1)))
  return jnp.asarray(sizes * np.random.default_rng(1).normal(size=shape), jnp.float32)


@pytest.fixture
def adafactor():
  config = OptimizerConfig(
    name="adafactor", learning_rate=0.1, warmup=0, clip=0.0, weight_decay=0.0
  )
  return make_optimizer(dataclasses.replace(config, steps=10**9))


def test_adafactor_is_optaxs_for_single_matrices_and_vectors(adafactor):
  peer = optax.adafactor(0.1, multiply_by_parameter_scale=False)
  grads = {
    "kernel": _draw(130, 140),
    "small": {"kernel": _draw(5, 300)},
    "bias": _draw(1, 1, 7)[0, 0],
  }
  ours, theirs = _updates(adafactor, grads), _updates(peer, grads)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)


@pytest.mark.parametrize("repeats", [3, 200])
def test_adafactor_takes_stacked_layers_as_single_ones(adafactor, repeats):
  """200 layers are more than the columns that are factored, 3 are fewer."""
  stack = {"kernel": _draw(repeats, 130, 140)[..., :136], "norm": _draw(repeats, 1, 9)[:, 0]}
  stack["experts"] = {"kernel": _draw(repeats, 2, 3, 4)}
  whole = _updates(adafactor, stack)
  for i in (0, repeats - 1):
    alone = _updates(adafactor, jax.tree.map(lambda x, i=i: x[i], stack))
    jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5), whole, alone)
  sizes = np.sqrt(np.square(whole["norm"]).mean(-1))
  assert sizes.max() <= 0.1 * (1 + 1e-6)


@pytest.mark.parametrize("wrong", [{"name": "sgd"}, {"steps": 0}, {"clip": -1.0}, {"warmup": -1}])
def test_wrong_values_are_named(wrong):
  with pytest.raises(ValueError, match=next(iter(wrong))):
    make_optimizer(OptimizerConfig(**wrong))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("size", [1e-4, 300.0])
def test_gradients_of_16_bits_move_parameters_as_those_of_32_do(name, size):
  config = OptimizerConfig(name=name, learning_rate=0.5, warmup=0, steps=9, clip=1e3)
  optimizer = make_optimizer(config)
  params = {"kernel": jnp.linspace(1, 2, 65_536, dtype=jnp.float16).reshape(256, 256)}
  gradients = jax.tree.map(lambda x: (size * jnp.sin(100 * x)).astype(jnp.float16), params)
  wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)

  @jax.jit
  def twice(params, gradients):
    state = optimizer.init(params)
    _, state = optimizer.update(gradients, state, params)
    return optimizer.update(gradients, state, params)[0]

  moved, expected = twice(params, gradients), twice(wide(params), wide(gradients))
  np.testing.assert_allclose(wide(moved)["kernel"], expected["kernel"], rtol=1e-2, atol=1e-5)
