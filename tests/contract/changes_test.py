"""Transforms, objectives, routers and placements, through the same tests."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core import trees
from effjax.layers import Context, Router, Routing
from effjax.layers.stack import join, split
from effjax.models import Transformer
from effjax.parallel import Placement
from effjax.train import init_state, make_train_step
from tests.contract.changes import (
  BATCH,
  DENSE,
  OBJECTIVES,
  PLACEMENTS,
  ROUTERS,
  TRANSFORMS,
  elsewhere,
)
from tests.contract.layers import KEY, TOKENS, B, D, T, X
from tests.modules import apply, random_params

each = lambda name, rows: pytest.mark.parametrize(name, rows, ids=lambda row: row.name)


@functools.cache
def drawn(config):
  return random_params(Transformer(config), TOKENS)


def logits(config, params):
  return np.asarray(apply(Transformer(config), params, TOKENS))


def changed(row):
  """The changed configuration, and the changed parameters from one program."""
  configs = []

  def change(params):
    config, new = row.change(row.config, params)
    configs.append(config)
    return new

  params = (jax.jit(change) if row.traced else change)(drawn(row.config))
  return configs[0], params


@each("row", TRANSFORMS)
def test_a_transform_gives_a_model_of_its_configuration(row):
  config, params = changed(row)
  wanted = jax.eval_shape(Transformer(config).init, KEY, TOKENS)["params"]
  shapes = lambda tree: {path: tuple(x.shape) for path, x in trees.items(tree).items()}
  assert shapes(params) == shapes(wanted)
  apart = jax.jit(lambda params: join(config, *split(config, params)))
  chex.assert_trees_all_equal(apart(params), params)
  after = logits(config, params)
  assert np.isfinite(after).all()
  if row.same is not None:
    before = logits(row.config, drawn(row.config))
    assert np.abs(after - before).max() <= row.same * np.abs(before).max()


@each("row", TRANSFORMS)
def test_a_transform_works_on_shapes(row):
  shapes = jax.eval_shape(Transformer(row.config).init, KEY, TOKENS)["params"]
  change = lambda params: row.change(row.config, params)[1]
  if row.traced:
    assert trees.count(jax.eval_shape(change, shapes)) > 0
  else:
    with pytest.raises(ValueError, match="traced"):
      jax.eval_shape(change, shapes)


@each("row", OBJECTIVES)
def test_what_has_no_weight_has_no_influence(row):
  objective = row.make(Transformer(DENSE))
  grad = jax.jit(jax.value_and_grad(objective, has_aux=True))
  (loss, metrics), grads = grad(drawn(DENSE), BATCH, None)
  (same, _), others = grad(drawn(DENSE), elsewhere(BATCH), None)
  assert np.isfinite(loss) and float(loss) == float(same)
  chex.assert_tree_all_finite(grads)
  chex.assert_trees_all_close(grads, others, atol=1e-7)
  assert any(np.asarray(g).any() for g in jax.tree.leaves(grads))
  assert float(metrics["weight"]) == float(BATCH["weights"].sum())
  assert all(jnp.shape(x) == () for x in metrics.values())


@each("row", OBJECTIVES)
def test_an_objective_names_what_it_does_not_read(row):
  with pytest.raises(ValueError, match="nobody reads domain"):
    row.make(Transformer(DENSE))(drawn(DENSE), BATCH | {"domain": TOKENS}, None)


OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def after_a_step(objective, placement=None, microbatches=1):
  """State and metrics after one step on the batch, laid out as the placement wants it."""
  step = make_train_step(objective, OPTIMIZER, placement=placement, microbatches=microbatches)
  state, batch = init_state(jax.tree.map(jnp.array, drawn(DENSE)), OPTIMIZER), BATCH
  if placement is not None:
    state = jax.device_put(state, placement.state(state))
    batch = jax.device_put(batch, placement.batch(batch))
  return step(state, batch, KEY)


@functools.cache
def plain(row):
  """State and metrics after a step with the objective of a row."""
  return after_a_step(row.make(Transformer(DENSE)))


@each("row", OBJECTIVES)
def test_microbatches_are_the_batch(row):
  (one, first), (two, second) = (
    plain(row), after_a_step(row.make(Transformer(DENSE)), microbatches=2)
  )  # fmt: skip
  chex.assert_trees_all_close(one.params, two.params, atol=1e-6)
  np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def routed(router, params, rows, mask, masked):
  """Which experts each row visits, its gates, what was sown, and gradients of rows and parameters.

  The cotangents of the gates are 1, and `masked` where the mask is False.
  """

  def apply(rows, params):
    routing, sown = router.apply(
      {"params": params}, rows, Context(), mask, mutable=["losses", "metrics"]
    )
    losses = sum(map(jnp.sum, jax.tree.leaves(sown.get("losses", {}))), start=jnp.float32(0))
    experts, gates = by_row(routing, rows.shape[0])
    return (gates, losses), (experts, sown)

  (gates, _), pull, (experts, sown) = jax.vjp(apply, rows, params, has_aux=True)
  weights = jnp.where(mask[:, None], jnp.ones_like(gates), masked)
  return experts, gates, sown, *pull((weights, jnp.ones(())))


def by_row(routing, rows):
  """Experts and gates [M, k]; where experts choose rows [M, E], with E for those that did not."""
  if isinstance(routing, Routing):
    return routing.experts, routing.gates
  count = routing.rows.shape[0]
  expert = jnp.arange(count)[:, None]
  place = lambda empty, x: empty.at[routing.rows, expert].set(x, mode="drop")
  ids = jnp.broadcast_to(expert, routing.rows.shape)
  return place(jnp.full((rows, count), count), ids), place(jnp.zeros((rows, count)), routing.gates)


@each("row", ROUTERS)
def test_a_router_decides_for_each_token_and_padding_has_no_influence(row):
  assert isinstance(row.router, Router)
  rows, real = np.asarray(X).reshape(-1, D), np.arange(B * T) % 3 > 0
  params = random_params(row.router, rows, Context(), real)
  run = lambda *given: jax.tree.map(
    np.asarray, routed(row.router, params, given[0], real, given[1])
  )
  experts, gates, sown, grads, slopes = run(rows, np.float32(0))
  k, count = experts.shape[1], row.router.experts
  assert experts.shape == gates.shape == (B * T, k) and row.router.used <= k
  assert (experts >= 0).all() and ((experts < count) | row.drops)[real].all()
  chosen = [[e for e in each if e < count] for each in experts.tolist()]
  assert all(len(set(each)) == len(each) for each in chosen) and not gates[experts >= count].any()
  if row.sums is not None:
    np.testing.assert_allclose(gates.sum(1), row.sums, rtol=1e-5)
  poisoned = np.where(real[:, None], rows, np.float32(np.nan))
  other_experts, other_gates, other_sown, other_grads, other_slopes = run(
    poisoned, np.float32(np.nan)
  )
  np.testing.assert_array_equal(other_experts[real], experts[real])
  np.testing.assert_array_equal(other_gates[real], gates[real])
  chex.assert_trees_all_close(other_sown, sown, rtol=1e-6)
  np.testing.assert_allclose(other_grads[real], grads[real], rtol=1e-5, atol=1e-7)
  chex.assert_trees_all_equal(other_slopes, slopes)
  assert not other_grads[~real].any() and np.isfinite(grads).all()
  assert row.router.flops(D, T) >= 0 and set(row.router.axes) == set(params)


@each("row", PLACEMENTS)
def test_a_step_is_the_same_under_every_placement(row):
  placement, objective = row.make(), OBJECTIVES[0]
  assert isinstance(placement, Placement)
  expected, metrics = plain(objective)
  found, own = after_a_step(objective.make(Transformer(DENSE)), placement)
  np.testing.assert_allclose(own["loss"], metrics["loss"], rtol=1e-5)
  np.testing.assert_allclose(own["grad_norm"], metrics["grad_norm"], rtol=1e-4)
  chex.assert_trees_all_close(found.params, expected.params, atol=2e-4)
