"""Transforms, objectives and placements, through the same tests."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core import trees
from effjax.layers.stack import join, split
from effjax.models import Transformer
from effjax.parallel import Placement
from effjax.train import init_state, make_train_step, next_token
from tests.contract.changes import BATCH, DENSE, OBJECTIVES, PLACEMENTS, TRANSFORMS, elsewhere
from tests.contract.layers import KEY, TOKENS

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
