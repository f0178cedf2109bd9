import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core import linear, weights
from effjax.peft import lora
from effjax.train import init_state, make_train_step


@weights.register(static=("note",))
class Scaled(weights.Weight):
  """codes · scale, to stand for a quantised weight."""

  codes: object
  scale: object
  note: str = "int8"

  shape = property(lambda self: self.codes.shape)
  dtype = property(lambda self: self.scale.dtype)

  def materialize(self):
    return self.codes * self.scale


def _run(objective, params, batch, optimizer, key, *, trainable=None, **arguments):
  state = init_state(jax.tree.map(np.asarray, params), optimizer, trainable=trainable)
  return make_train_step(objective, optimizer, **arguments)(state, batch, key)


def test_a_step_is_the_gradient_step(bigram, bigram_step, stream, key):
  _, params, objective = bigram(coefficient=0.3)
  optimizer, step = bigram_step(0.1, adam=False, coefficient=0.3)
  batch = next(stream())
  state, metrics = step(init_state(params, optimizer), batch, key)
  grad = jax.jit(jax.value_and_grad(objective, has_aux=True))
  (loss, _), grads = jax.tree.map(np.asarray, grad(params, batch, None))
  expected = jax.tree.map(lambda w, g: w - np.float32(0.1) * g, params, grads)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.params, expected
  )
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
  norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
  assert int(state.step) == 1


@pytest.mark.parametrize("microbatches", [2, 8])
def test_accumulation_is_the_mean_over_tokens_not_over_microbatches(
  bigram, bigram_step, stream, key, microbatches
):
  _, params, _ = bigram(coefficient=0.3)
  batch = next(stream())
  # Very unequal counts; of eight microbatches three have none.
  batch["weights"][:3], batch["weights"][3] = 0.0, 0.01
  found = []
  for parts in (1, microbatches):
    optimizer, step = bigram_step(0.1, adam=False, coefficient=0.3, microbatches=parts)
    found.append(step(init_state(params, optimizer), batch, key))
  (whole, expected), (parts, metrics) = found
  np.testing.assert_allclose(metrics["nll"], expected["nll"], rtol=1e-5)
  np.testing.assert_allclose(metrics["weight"], expected["weight"], rtol=1e-6)
  assert set(metrics) == set(expected)
  for a, b in zip(
    jax.tree.leaves(parts.params["head"]), jax.tree.leaves(whole.params["head"]), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_microbatches_of_no_weight_are_not_read(key):
  def objective(params, batch, rng):
    weight = batch["weights"].sum()
    return (params["w"] * batch["x"]).sum() / weight, {"weight": weight, "x": batch["x"].sum()}

  batch = {"weights": jnp.array([1e-12, 0.0]), "x": jnp.array([3e-12, jnp.inf])}
  params, optimizer = {"w": jnp.ones(1)}, optax.sgd(1.0)
  state, metrics = _run(objective, params, batch, optimizer, key, microbatches=2)
  np.testing.assert_allclose(state.params["w"], [1.0 - 3.0], rtol=1e-6)
  np.testing.assert_allclose(metrics["loss"], 3.0, rtol=1e-6)
  np.testing.assert_allclose(metrics["x"], 3e-12, rtol=1e-6)


def test_microbatches_that_do_not_divide_are_refused(bigram, stream, key):
  _, params, objective = bigram()
  with pytest.raises(ValueError, match="microbatches=3 does not divide the batch of 8"):
    _run(objective, params, next(stream()), optax.sgd(0.1), key, microbatches=3)


def test_only_the_trainable_part_moves(bigram, stream, key):
  _, params, objective = bigram()
  state, _ = _run(objective, params, next(stream()), optax.adam(0.1), key, trainable="head")
  moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), state.params, params)
  assert all(jax.tree.leaves(moved["head"]))
  assert not any(jax.tree.leaves([moved["embed"], moved["up"], moved["norm"]]))


def test_a_quantised_weight_trains_its_scale_and_keeps_its_codes(key):
  params = {"w": Scaled(jnp.arange(6, dtype=jnp.int8).reshape(3, 2), jnp.ones((1, 2)))}
  objective = lambda params, batch, rng: (
    jnp.square(batch["x"] @ params["w"].materialize()).mean(),
    {},
  )
  state, _ = _run(objective, params, {"x": np.ones((4, 3), np.float32)}, optax.sgd(0.1), key)
  assert isinstance(state.params["w"], Scaled) and state.params["w"].note == "int8"
  np.testing.assert_array_equal(state.params["w"].codes, params["w"].codes)
  assert not np.array_equal(state.params["w"].scale, params["w"].scale)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(bigram, bigram_step, stream, key, microbatches):
  _, params, _ = bigram()
  optimizer, step = bigram_step(microbatches=microbatches)
  state, metrics = step(init_state(params, optimizer), next(stream(poison=1)), key)
  assert not bool(metrics["finite"]) and np.isnan(metrics["loss"])
  for a, b in zip(
    jax.tree.leaves(state), jax.tree.leaves(init_state(params, optimizer)), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_randomness_differs_by_step_and_microbatch(key):
  objective = lambda params, batch, rng: (
    params["w"] * jax.random.normal(rng),
    {"draw": jax.random.normal(rng)},
  )
  optimizer = optax.sgd(0.0)
  step = make_train_step(objective, optimizer, microbatches=2)
  state = init_state({"w": np.ones((), np.float32)}, optimizer)
  draws = []
  for _ in range(2):
    state, metrics = step(state, {"x": jnp.ones(2)}, key)
    draws.append(float(metrics["draw"]))
  again, _ = step(init_state({"w": jnp.ones(())}, optimizer), {"x": jnp.ones(2)}, key)
  assert draws[0] != draws[1] and int(again.step) == 1


def test_training_learns(bigram, bigram_step, stream, key):
  optimizer, step = bigram_step()
  state, batches = init_state(bigram()[1], optimizer), stream()
  losses = []
  for _ in range(60):
    state, metrics = step(state, next(batches), key)
    losses.append(float(metrics["loss"]))
  assert np.mean(losses[-5:]) < 1.1 < 2.0 < losses[0]  # log 2 is the entropy of the stream


def test_bfloat16_parameters_keep_their_type_through_accumulation(bigram, stream, key):
  _, params, objective = bigram()
  params = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params)
  state, _ = _run(objective, params, next(stream()), optax.sgd(0.1), key, microbatches=2)
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}


def test_arrays_an_objective_holds_are_arguments_of_the_program():
  def objective(held, params, batch, rng):
    return (params["w"] * held * batch["x"][0]).sum(), {}

  state = init_state({"w": jnp.ones(999)}, optax.sgd(0.1))
  held = jax.tree_util.Partial(objective, jnp.arange(999.0))
  batch = {"x": jnp.ones((1, 999))}
  text = make_train_step(held, optax.sgd(0.1)).lower(state, batch, jax.random.key(0)).as_text()
  assert text.count("tensor<999xf32>") > 0
  assert not any("constant" in line and "999" in line for line in text.splitlines())


def test_adapters_alone_train_where_nobody_says_so(key):
  base = {"up": {"kernel": jnp.ones((4, 6))}, "norm": {"scale": jnp.ones(6)}}
  params = lora.add(base, key, rank=2, targets="kernel")
  objective = lambda params, batch, rng: (
    jnp.square(
      linear(batch["x"], params["up"]["kernel"]) * params["norm"]["scale"][None] - 1
    ).sum(),
    {},
  )
  optimizer = optax.adamw(0.1)
  state = init_state(jax.tree.map(np.asarray, params), optimizer)
  assert state.partition()[0]["norm"]["scale"] is None
  mu = state.opt_state[0].mu
  assert [x.shape for x in jax.tree.leaves(mu)] == [(4, 2), (2, 6)]
  step = make_train_step(objective, optimizer)
  for _ in range(3):
    state, _ = step(state, {"x": np.ones((2, 4), np.float32)}, key)
  moved, merged = state.params["up"]["kernel"], lora.merge(state.params)
  np.testing.assert_array_equal(moved.base, base["up"]["kernel"])
  np.testing.assert_array_equal(moved.scale, params["up"]["kernel"].scale)
  np.testing.assert_array_equal(state.params["norm"]["scale"], base["norm"]["scale"])
  assert not np.array_equal(moved.b, params["up"]["kernel"].b)
  assert not np.array_equal(merged["up"]["kernel"], base["up"]["kernel"])


def test_after_carries_what_the_optimiser_does_not(key):
  def objective(params, batch, rng, extra):
    return extra["scale"] * (params["w"] * batch["x"]).sum(), {"seen": extra["scale"]}

  def after(state, metrics):
    scale = state.extra["scale"] * jnp.where(metrics["finite"], 2.0, 0.5)
    return dataclasses.replace(state, extra={"scale": scale})

  optimizer = optax.sgd(0.5)
  step = make_train_step(objective, optimizer, after=after)
  state = init_state({"w": jnp.ones(())}, optimizer, extra={"scale": jnp.float32(1.0)})
  scales = []
  for x in (1.0, np.nan, 1.0):
    state, metrics = step(state, {"x": jnp.full(2, x)}, key)
    scales.append((float(metrics["seen"]), float(state.extra["scale"]), float(state.params["w"])))
  assert scales == [(1.0, 2.0, 0.0), (2.0, 1.0, 0.0), (1.0, 2.0, -1.0)]


def test_the_norm_of_16_bit_gradients_does_not_overflow(key):
  objective = lambda params, batch, rng: (
    (params["w"] * batch["x"][0]).astype(jnp.float32).sum(),
    {},
  )
  state = init_state({"w": jnp.ones(4, jnp.float16)}, optax.sgd(2.0**-9))
  step = make_train_step(objective, optax.sgd(2.0**-9))
  state, metrics = step(state, {"x": jnp.full((1, 4), 512, jnp.float16)}, key)
  assert bool(metrics["finite"]) and float(metrics["grad_norm"]) == 1024
  np.testing.assert_array_equal(state.params["w"], np.zeros(4))
