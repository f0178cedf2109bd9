"""Parameters too coarse for small steps train as their copies in float32 do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core import trees
from effjax.parallel import make_mesh, place
from effjax.train import Checkpoints, init_state, make_train_step, master_copies
from tests.train.conftest import Stream

COARSE = [jnp.bfloat16, jnp.float16]


def _objective(params, batch, rng):
  """Gradients that are exact in every type: 1 for `w`, 2 for `scale`."""
  return params["w"].astype(jnp.float32).sum() + 2 * params["scale"].sum(), {}


@pytest.mark.parametrize("dtype", COARSE)
@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_coarse_parameters_follow_their_copies_in_float32(name, dtype, key):
  optimizer = getattr(optax, name)(1e-3)
  wide = {"w": jnp.full((2, 3), 1.5), "scale": jnp.full(3, 1.5)}
  params = {"w": wide["w"].astype(dtype), "scale": wide["scale"]}
  grads = {"w": jnp.ones((2, 3)), "scale": jnp.full(3, 2.0)}
  state = init_state(jax.tree.map(jnp.array, params), optimizer)
  step = make_train_step(_objective, optimizer)
  reference, update = optimizer.init(wide), jax.jit(optimizer.update)
  for _ in range(20):
    state, _ = step(state, {"x": np.ones(1)}, key)
    updates, reference = update(grads, reference, wide)
    wide = optax.apply_updates(wide, updates)
  np.testing.assert_array_equal(state.params["w"], wide["w"].astype(dtype))
  np.testing.assert_allclose(state.opt_state[0]["w"], wide["w"], rtol=1e-6)
  np.testing.assert_allclose(state.params["scale"], wide["scale"], rtol=1e-6)
  assert state.params["w"].dtype == dtype and state.opt_state[0]["scale"] is None
  assert not np.allclose(state.opt_state[0]["w"], 1.5)


def test_a_model_in_bfloat16_learns_at_a_small_rate(bigram, key):
  """Losses of 30 steps are those of float32 to 1 %; every matrix has moved."""
  _, params, objective = bigram()
  losses = {}
  for dtype in (jnp.float32, jnp.bfloat16):
    optimizer, stream = optax.adamw(1e-3), Stream()
    state = init_state(jax.tree.map(lambda x, d=dtype: jnp.asarray(x, d), params), optimizer)
    step = make_train_step(objective, optimizer)
    start = jax.tree.map(np.asarray, state.params)
    found = []
    for _ in range(30):
      state, metrics = step(state, next(stream), key)
      found.append(float(metrics["loss"]))
    losses[dtype] = np.array(found)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), start, state.params)
    assert all(jax.tree.leaves(moved))
  np.testing.assert_allclose(losses[jnp.bfloat16], losses[jnp.float32], rtol=1e-2)


def test_float32_keeps_the_state_of_the_optimiser_itself():
  params, optimizer = {"w": jnp.ones(2)}, optax.adam(1e-3)
  plain, wrapped = optimizer.init(params), master_copies(optimizer).init(params)
  assert jax.tree.structure(plain) == jax.tree.structure(wrapped)


def test_twice_is_once():
  params, once = {"w": jnp.ones(2, jnp.bfloat16)}, master_copies(optax.adam(1e-3))
  twice = master_copies(once)
  assert jax.tree.structure(once.init(params)) == jax.tree.structure(twice.init(params))


def test_copies_are_saved_and_are_split_as_the_optimisers_state(tmp_path):
  state = init_state({"w": jnp.ones((16, 8), jnp.bfloat16)}, optax.adam(1e-3))
  assert trees.nbytes(state.opt_state[0]) == 16 * 8 * 4
  placed = place(state, make_mesh(data=8), zero=1)
  assert placed.opt_state[0]["w"].addressable_shards[0].data.shape == (2, 8)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, placed)
    saved = checkpoints.restore(state).state
  np.testing.assert_array_equal(saved.opt_state[0]["w"], 1.0)
