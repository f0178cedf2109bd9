"""What finds room in an expert, to the token: against loops, and the published rules for sizes."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.layers import Routing
from effjax.moe import (
  Capacity,
  batch_priority_routing,
  drop_overflow,
  gshard_routing,
  switch_routing,
  top_k_routing,
)
from tests.modules import normal
from tests.moe import brute_force

M, E = 40, 5
CASES = range(4)
MASK = np.random.default_rng(7).random(M) < 0.7


def logits(seed):
  return normal(M, E, seed=seed) + jnp.array([[2.0, 1.0, 0.0, 0.0, -3.0]])


@jax.jit
def decided(logits, mask):
  """What each router decides by the same logits, with and without padding."""
  found = {}
  for name, there in {"all": None, "some": mask}.items():
    for capacity in (3, 11):
      found[name, capacity] = {
        "switch": switch_routing(logits, capacity=capacity, mask=there),
        "gshard": gshard_routing(logits, None, capacity=capacity, mask=there),
        "after": gshard_routing(logits, None, capacity=capacity, mask=there, renormalize="after"),
        "priority": batch_priority_routing(logits, k=2, capacity=capacity, mask=there),
      }
  return found


@pytest.mark.parametrize("seed", CASES)
def test_each_router_equals_a_loop_over_tokens(seed):
  x = logits(seed)
  order = np.argsort(-brute_force.softmax(x).max(-1), kind="stable")
  for (name, capacity), found in decided(x, MASK).items():
    mask = MASK if name == "some" else None
    wanted = {
      "switch": (brute_force.top_k(x, 1, False), None),
      "gshard": (brute_force.top_k(x, 2, True), None),
      "after": (brute_force.top_k(x, 2, True), None),
      "priority": (brute_force.top_k(x, 2, False), order),
    }
    for router, (choices, first) in wanted.items():
      experts, gates = brute_force.limited(*choices, capacity, E, mask, first)
      if router == "after":
        gates = gates / np.where(gates.sum(1, keepdims=True) > 0, gates.sum(1, keepdims=True), 1)
      routing = found[router]
      chex.assert_trees_all_equal(np.asarray(routing.experts), experts)
      chex.assert_trees_all_close(routing.gates, gates, atol=1e-6)
      assert routing.capacity == capacity
      assert np.bincount(experts.ravel(), minlength=E + 1)[:E].max() <= capacity


def test_switch_fills_experts_in_the_order_of_tokens():
  x = jnp.array([[3.0, 0], [2, 0], [0, 1], [9, 0], [0, 5], [0, 9]])
  mask = jnp.array([True, False, True, True, True, True])
  found = jax.jit(lambda x, mask: switch_routing(x, capacity=2, mask=mask).experts[:, 0])
  assert found(x, jnp.ones(6, bool)).tolist() == [0, 0, 1, 2, 1, 2]
  assert found(x, mask).tolist() == [0, 2, 1, 0, 1, 2]


def test_groups_have_a_capacity_each():
  x = logits(0).reshape(4, 10, E)
  routing = jax.jit(lambda x: switch_routing(x, capacity=2))(x)
  each = [brute_force.limited(*brute_force.top_k(group, 1, False), 2, E) for group in x]
  chex.assert_trees_all_equal(np.asarray(routing.experts), np.stack([e for e, _ in each]))


def test_surer_tokens_come_first_where_probabilities_are_all_one():
  x = jnp.array([[30.0, 0.0], [80.0, 0.0], [60.0, 0.0]])
  routing = jax.jit(lambda x: batch_priority_routing(x, k=1, capacity=1))(x)
  assert routing.experts[:, 0].tolist() == [2, 0, 2]


def test_what_finds_no_room_gets_no_gradient_and_what_does_its_own():
  x = logits(1)

  @jax.jit
  def run(x):
    gates = lambda x: drop_overflow(top_k_routing(x, k=2), 6, count=E).gates
    own = lambda x: jnp.square(gates(x)).sum()
    return gates(x), jax.grad(own)(x)

  gates, slopes = map(np.asarray, run(x))
  one_kept = (gates > 0).sum(-1) == 1
  slopes = np.abs(slopes).max(-1)
  assert (slopes[one_kept] > 1e-4).all() and one_kept.any()
  assert not slopes[(gates == 0).all(-1)].any() and (gates == 0).all(-1).any()


def test_what_is_none_takes_no_room_and_stays_none():
  routing = Routing(jnp.array([[7, 0], [-1, 0], [1, 0]]), jnp.ones((3, 2)))
  limited = drop_overflow(routing, 2, count=2)
  assert limited.experts.tolist() == [[2, 0], [2, 0], [1, 2]]
  assert limited.gates.tolist() == [[0, 1], [0, 1], [1, 0]]


def test_no_rows_and_one_expert():
  assert switch_routing(jnp.zeros((0, 3)), capacity=1).gates.shape == (0, 1)
  one = jax.jit(lambda mask: switch_routing(jnp.zeros((3, 1)), capacity=2, mask=mask))
  assert one(jnp.ones(3, bool)).experts.tolist() == [[0], [0], [1]]
  assert not one(jnp.zeros(3, bool)).gates.any()


def test_the_second_expert_is_sent_as_often_as_its_gate_says():
  x = jnp.log(jnp.array([[0.8, 0.2], [0.9, 0.1], [0.4, 0.6], [1.0, 0.0]]))

  @jax.jit
  @jax.vmap
  def sent(key):
    sent = lambda threshold: gshard_routing(x, key, capacity=4, threshold=threshold).experts < 2
    return sent(0.5), sent(0.2)

  half, fifth = (np.asarray(s).mean(0) for s in sent(jax.random.split(jax.random.key(0), 4000)))
  chex.assert_trees_all_equal(half[:, 0], np.ones(4))
  np.testing.assert_allclose(half[:, 1], [0.4, 0.2, 0.8, 0.0], atol=0.03)
  np.testing.assert_allclose(fifth[:, 1], [1.0, 0.5, 1.0, 0.0], atol=0.03)


RULES = {
  "switch": (Capacity(1.25), lambda S, k, f: math.ceil(k * S * f / 8)),
  "mesh": (
    Capacity(1.25, rounding="down", least=4, per_choice=False),
    lambda S, k, f: max(4, min(S, int(S * f / 8))),
  ),
  "flaxformer": (
    Capacity(1.25, rounding="nearest", least=4, per_choice=False),
    lambda S, k, f: max(4, round(S * f / 8)),
  ),
  "v-moe": (Capacity(1.25, multiple=4), lambda S, k, f: -(-math.ceil(k * S * f / 8) // 4) * 4),
}


@pytest.mark.parametrize("rule", RULES)
def test_capacity_is_that_of_published_rules(rule):
  capacity, published = RULES[rule]
  for rows in range(8, 200):
    for k in (1, 2):
      found = capacity.of(rows, experts=8, choices=k)
      assert found == min(published(rows, k, 1.25), rows)


def test_capacity_is_exact_for_a_factor_as_it_is_written():
  assert Capacity(1.1).of(10, experts=1) == 10 and Capacity(1.1).of(100, experts=10) == 11
  assert Capacity(0.7).of(10, experts=1) == Capacity(np.float64(0.7)).of(10, experts=1) == 7
  assert Capacity(0.01).of(8, experts=8) == 1 and Capacity(9).of(8, experts=1) == 8


def test_without_a_factor_for_evaluation_there_is_no_limit_in_it():
  assert Capacity(1.0).of(8, experts=2, training=False) is None
  assert Capacity(1.0, evaluation=2).of(8, experts=4, training=False) == 4


@pytest.mark.parametrize(
  ("field", "value"),
  [("factor", 0), ("factor", -1.0), ("evaluation", 0), ("least", 0), ("multiple", 0)],
)
def test_a_capacity_of_nothing(field, value):
  with pytest.raises(ValueError, match=f"Capacity: {field}="):
    Capacity(**{field: value})


def test_bad_arguments():
  x = jnp.zeros((3, 2))
  for function in (switch_routing, lambda x, **more: gshard_routing(x, None, **more)):
    with pytest.raises(ValueError, match="capacity=0; allowed: from 1"):
      function(x, capacity=0)
  with pytest.raises(ValueError, match="capacity is traced; allowed: a size that is known"):
    jax.jit(lambda capacity: switch_routing(x, capacity=capacity))(2)
  assert switch_routing(x, capacity=jnp.int32(2)).capacity == 2
  with pytest.raises(ValueError, match="k=2; allowed: 1 … 1"):
    gshard_routing(x[:, :1], None, capacity=1)
  with pytest.raises(ValueError, match="threshold=0; allowed: above 0"):
    gshard_routing(x, jax.random.key(0), capacity=1, threshold=0)
  with pytest.raises(ValueError, match="renormalize='before'; allowed: True, False or 'after'"):
    gshard_routing(x, None, capacity=1, renormalize="before")
  with pytest.raises(ValueError, match=r"mask \(2,\); allowed: \(3,\)"):
    switch_routing(x, capacity=1, mask=jnp.ones(2, bool))
  with pytest.raises(ValueError, match="rounding='half'; allowed: up, down, nearest"):
    Capacity(rounding="half")
