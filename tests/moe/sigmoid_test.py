"""Sigmoid gates with a bias on the choice, and what moves the bias."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core import trees
from effjax.layers import MLP, LayerSpec, TransformerConfig
from effjax.layers.forward import forward, sown_values
from effjax.models import Transformer
from effjax.moe import GroupLimit, MoE, SigmoidTopK, move_bias, sigmoid_routing
from effjax.train import init_state, make_train_step
from tests.modules import normal
from tests.moe import brute_force

ROUTER = "segments_0/layers_0/ffn/router"


E, K = 8, 3
LIMIT = GroupLimit(4, 2, best=2)


@jax.jit
def routed(logits, bias):
  return {
    (renormalize, limited): sigmoid_routing(
      logits, bias, k=K, renormalize=renormalize, limit=LIMIT if limited else None
    )
    for renormalize in (False, True)
    for limited in (False, True)
  }


def test_gates_are_sigmoids_and_the_bias_has_a_say_in_the_choice_alone():
  logits, bias = normal(40, E), 0.3 * normal(E, seed=1)
  scores = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
  for (renormalize, limited), routing in routed(logits, bias).items():
    chosen_by = scores + np.asarray(bias)
    if limited:
      each = chosen_by.reshape(40, 4, 2)
      kept = brute_force.best(each.sum(-1), 2)
      keep = (np.arange(4) == kept[..., None]).any(1)
      chosen_by = np.where(keep[..., None], each, -np.inf).reshape(40, E)
    experts = brute_force.best(chosen_by, K)
    gates = np.take_along_axis(scores, experts, -1)
    if renormalize:
      gates = gates / gates.sum(-1, keepdims=True)
    chex.assert_trees_all_equal(np.asarray(routing.experts), experts)
    chex.assert_trees_all_close(routing.gates, gates, atol=1e-6)
    chex.assert_trees_all_close(routing.probs, scores / scores.sum(-1, keepdims=True), atol=1e-6)


def test_wide_logits_keep_their_order_and_their_gates():
  logits = jnp.array([[90.0, 200.0, 50.0, 120.0], [-300.0, -500.0, -200.0, -400.0]])
  routing = jax.jit(lambda x: sigmoid_routing(x, jnp.zeros(4), k=4))(logits)
  assert routing.experts.tolist() == [[1, 3, 0, 2], [2, 0, 3, 1]]
  chex.assert_trees_all_close(routing.gates, jnp.array([[0.25] * 4, [1.0, 0, 0, 0]]))


def test_bad_arguments():
  with pytest.raises(ValueError, match="k=5; allowed: 1 … 4"):
    sigmoid_routing(jnp.zeros((2, 4)), k=5)
  with pytest.raises(ValueError, match=r"bias \(3,\); allowed: \(4,\)"):
    sigmoid_routing(jnp.zeros((2, 4)), jnp.zeros(3), k=1)
  with pytest.raises(ValueError, match="no router has a bias"):
    move_bias(init_state({"kernel": jnp.ones(2)}, optax.sgd(1.0)), {})


def test_the_bias_evens_the_load_in_a_training_step_without_a_loss_or_a_gradient():
  router, rows = SigmoidTopK(4, 2), normal(64, 8)
  params = {"kernel": normal(8, 4, seed=1) / 3, "bias": jnp.array([1.0, 1.0, 0.0, 0.0])}

  def objective(params, batch, rng):
    routing, sown = router.apply({"params": params}, batch["rows"], mutable=["statistics"])
    return routing.gates.sum(), sown_values(sown)

  optimizer = optax.adam(1e-9)
  after = functools.partial(move_bias, speed=0.02)
  step = make_train_step(objective, optimizer, microbatches=2, after=after)
  state, loads = init_state(params, optimizer), []
  for _ in range(80):
    before = np.asarray(state.params["bias"])
    state, metrics = step(state, {"rows": rows}, jax.random.key(0))
    load = np.asarray(metrics["load"])
    moved = np.asarray(state.params["bias"]) - before
    chex.assert_trees_all_close(moved, 0.02 * np.sign(load.mean() - load), atol=1e-6)
    loads.append(load)
  assert loads[0].max() == 0.5 and np.mean(loads[-10:], axis=0).max() < 0.3


def test_each_router_of_a_scanned_segment_has_a_bias_of_its_own():
  layers = (LayerSpec(None, MoE(SigmoidTopK(4, 2), MLP(4))),) * 2
  module, tokens = Transformer(TransformerConfig(9, 8, layers)), jnp.arange(8)[None]
  shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
  run = lambda params: forward(module, params, {"tokens": tokens})[1]
  metrics = jax.eval_shape(lambda params: sown_values(run(params)), shapes)
  load = jnp.array([[0.4, 0.2, 0.2, 0.2], [0.1, 0.3, 0.3, 0.3]])
  assert metrics[f"{ROUTER}/load"].shape == load.shape
  state = init_state({"router": {"bias": jnp.zeros((2, 4))}, "bias": jnp.ones(3)}, optax.sgd(1.0))
  moved = move_bias(state, {"router/load": load}).params
  expected = 1e-3 * np.array([[-1, 1, 1, 1], [1, -1, -1, -1]])
  chex.assert_trees_all_close(moved["router"]["bias"], expected, atol=1e-8)
  assert trees.items(shapes)[f"{ROUTER}/bias"].shape == (2, 4) and (moved["bias"] == 1).all()


def test_a_step_that_is_not_finite_moves_no_bias():
  state = init_state({"router": {"bias": jnp.zeros(2)}}, optax.sgd(1.0))
  metrics = {"router/load": jnp.array([1.0, 0.0]), "finite": jnp.array(False)}
  assert not move_bias(state, metrics).params["router"]["bias"].any()
