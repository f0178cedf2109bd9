"""Transforms, objectives, routers and placements, through the same tests."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core import trees
from effjax.layers import Context, Router
from effjax.layers.stack import join, split
from effjax.models import Transformer
from effjax.parallel import Placement
from effjax.train import init_state, make_train_step, next_token
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

each = lambda name, rows: pytest.mark.parametrize(name, rows, ids=lambda row: row.name)
fresh = jax.jit(lambda: Transformer(DENSE).init(KEY, TOKENS)["params"])


def logits(config, params):
  apply = jax.jit(lambda params: Transformer(config).apply({"params": params}, TOKENS))
  return np.asarray(apply(params))


@each("row", TRANSFORMS)
def test_a_transform_gives_a_model_of_its_configuration(row):
  params = jax.jit(lambda: Transformer(row.config).init(KEY, TOKENS)["params"])()
  config, changed = row.change(row.config, params)
  wanted = jax.eval_shape(Transformer(config).init, KEY, TOKENS)["params"]
  shapes = lambda tree: {path: tuple(x.shape) for path, x in trees.items(tree).items()}
  assert shapes(changed) == shapes(wanted)
  chex.assert_trees_all_equal(join(config, *split(config, changed)), changed)
  after = logits(config, changed)
  assert np.isfinite(after).all()
  if row.same is not None:
    before = logits(row.config, params)
    assert np.abs(after - before).max() <= row.same * np.abs(before).max()


@each("row", TRANSFORMS)
def test_a_transform_works_on_shapes(row):
  shapes = jax.eval_shape(Transformer(row.config).init, KEY, TOKENS)["params"]
  changed = jax.eval_shape(lambda params: row.change(row.config, params)[1], shapes)
  assert trees.count(changed) > 0


@each("row", OBJECTIVES)
def test_what_has_no_weight_has_no_influence(row):
  objective = row.make(Transformer(DENSE))
  grad = jax.jit(jax.value_and_grad(objective, has_aux=True))
  (loss, metrics), grads = grad(fresh(), BATCH, None)
  (same, _), others = grad(fresh(), elsewhere(BATCH), None)
  assert np.isfinite(loss) and float(loss) == float(same)
  chex.assert_tree_all_finite(grads)
  chex.assert_trees_all_close(grads, others, atol=1e-7)
  assert any(bool(g.any()) for g in jax.tree.leaves(grads))
  assert float(metrics["weight"]) == float(BATCH["weights"].sum())
  assert all(jnp.shape(x) == () for x in metrics.values())


@each("row", OBJECTIVES)
def test_an_objective_names_what_it_does_not_read(row):
  with pytest.raises(ValueError, match="nobody reads domain"):
    row.make(Transformer(DENSE))(fresh(), BATCH | {"domain": TOKENS}, None)


@each("row", OBJECTIVES)
def test_microbatches_are_the_batch(row):
  objective, optimizer = row.make(Transformer(DENSE)), optax.sgd(0.1)
  found = [
    make_train_step(objective, optimizer, microbatches=n)(
      init_state(fresh(), optimizer), BATCH, KEY
    )
    for n in (1, 2)
  ]
  (one, first), (two, second) = found
  chex.assert_trees_all_close(one.params, two.params, atol=1e-6)
  np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-5)


def routed(row, rows, mask):
  """The decision for `rows`, what was sown, and gradients of both by the rows."""
  params = row.router.init(KEY, rows, Context(), mask)["params"]
  apply = lambda rows: row.router.apply(
    {"params": params}, rows, Context(), mask, mutable=["losses", "metrics"]
  )

  def total(rows):
    routing, sown = apply(rows)
    kept = jnp.where(mask[:, None], routing.gates, 0)
    return kept.sum() + sum(map(jnp.sum, jax.tree.leaves(sown["losses"])))

  return *jax.jit(apply)(rows), jax.jit(jax.grad(total))(rows)


@each("row", ROUTERS)
def test_a_router_decides_for_each_token_and_padding_has_no_influence(row):
  assert isinstance(row.router, Router)
  rows, mask = X.reshape(-1, D), jnp.arange(B * T) % 3 > 0
  routing, sown, grads = routed(row, rows, mask)
  k = routing.experts.shape[1]
  assert routing.experts.shape == routing.gates.shape == (B * T, k) and row.router.used <= k
  assert ((routing.experts >= 0) & (routing.experts < row.router.experts)).all()
  assert all(len(set(each)) == k for each in routing.experts.tolist())
  if row.sums is not None:
    np.testing.assert_allclose(routing.gates.sum(1), row.sums, rtol=1e-5)
  poisoned = jnp.where(mask[:, None], rows, jnp.nan)
  other, other_sown, other_grads = routed(row, poisoned, mask)
  real = np.asarray(mask)
  np.testing.assert_array_equal(other.experts[real], routing.experts[real])
  np.testing.assert_array_equal(other.gates[real], routing.gates[real])
  chex.assert_trees_all_close(other_sown, sown, rtol=1e-6)
  np.testing.assert_allclose(other_grads[real], grads[real], rtol=1e-5, atol=1e-7)
  assert row.router.flops(D, T) >= 0 and set(row.router.axes) == {"kernel"}


@each("row", PLACEMENTS)
def test_a_step_is_the_same_under_every_placement(row):
  placement, optimizer = row.make(), optax.adam(0.01)
  assert isinstance(placement, Placement)
  module = Transformer(DENSE)
  step = make_train_step(next_token(module), optimizer, placement=placement)
  state = init_state(fresh(), optimizer)
  expected, metrics = make_train_step(next_token(module), optimizer)(
    init_state(fresh(), optimizer), BATCH, KEY
  )
  state = jax.device_put(state, placement.state(state))
  found, own = step(state, jax.device_put(BATCH, placement.batch(BATCH)), KEY)
  np.testing.assert_allclose(own["loss"], metrics["loss"], rtol=1e-5)
  np.testing.assert_allclose(own["grad_norm"], metrics["grad_norm"], rtol=1e-4)
  chex.assert_trees_all_close(found.params, expected.params, atol=2e-4)
