"""Top-k routing against NumPy, and what it promises for any logits."""

import itertools

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.moe import GroupLimit, top_k_routing
from tests.modules import normal
from tests.moe import brute_force

LOGITS = hnp.arrays(np.float32, (6, 5), elements=st.floats(-20, 20, width=32))


FORMS = [*itertools.product(range(1, 6), (False, True))]


@jax.jit
def routed(logits):
  """The decision for each k, with and without renormalisation."""
  return {(k, norm): top_k_routing(logits, k=k, renormalize=norm) for k, norm in FORMS}


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(logits=LOGITS)
def test_gates_are_the_largest_probabilities(logits):
  probs = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  for (k, renormalize), routing in routed(logits).items():
    largest = -np.sort(-probs, axis=-1)[:, :k]
    if renormalize:
      largest = largest / largest.sum(-1, keepdims=True)
    chex.assert_trees_all_close(routing.probs, probs, atol=1e-6)
    chex.assert_trees_all_close(routing.gates, largest, atol=1e-5)
    assert all(len(set(row)) == k for row in np.asarray(routing.experts).tolist())
    picked = np.take_along_axis(probs, np.asarray(routing.experts), axis=-1)
    assert (np.diff(picked, axis=-1) <= 1e-6).all()


def test_equal_logits_go_to_the_lowest_experts():
  assert top_k_routing(jnp.zeros((1, 4)), k=2).experts.tolist() == [[0, 1]]


def test_bfloat16_logits_are_routed_in_float32():
  routing = top_k_routing(jnp.ones((2, 3), jnp.bfloat16), k=1)
  assert routing.probs.dtype == routing.gates.dtype == routing.logits.dtype == jnp.float32


def test_router_learns_through_unnormalised_gates_only_when_k_is_one():
  logits = jnp.array([[1.0, 2.0, 0.5]])
  gate = lambda logits, renormalize: top_k_routing(logits, k=1, renormalize=renormalize).gates.sum()
  slopes = jax.jit(lambda logits: [jax.grad(gate)(logits, each) for each in (True, False)])(logits)
  assert np.abs(slopes[0]).max() < 1e-7
  assert np.abs(slopes[1]).min() > 0.01


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range(k):
  with pytest.raises(ValueError, match=f"k={k}; allowed: 1 … 4"):
    top_k_routing(jnp.zeros((2, 4)), k=k)


def test_wide_logits_keep_the_order_of_later_choices():
  logits = jnp.array([[-400.0, 0.0, -200.0, -300.0], [-1e30, -1e20, 1e30, -1e10]])
  routing = jax.jit(lambda logits: top_k_routing(logits, k=4, renormalize=False))(logits)
  assert routing.experts.tolist() == [[1, 2, 3, 0], [2, 3, 1, 0]]
  chex.assert_trees_all_equal(routing.gates, jnp.eye(4)[jnp.zeros(2, int)])
  gates = top_k_routing(logits, k=2).gates
  assert gates.tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("best", [1, 2])
def test_a_token_chooses_from_its_best_groups(best):
  logits, limit = normal(32, 12), GroupLimit(4, 2, best)
  routing = jax.jit(lambda logits: top_k_routing(logits, k=3, renormalize=False, limit=limit))(
    logits
  )
  probs = brute_force.softmax(logits)
  each = probs.reshape(32, 4, 3)
  kept = brute_force.best(np.sort(each, axis=-1)[..., -best:].sum(-1), 2)
  allowed = np.where((np.arange(4) == kept[..., None]).any(1)[..., None], each, -1).reshape(32, 12)
  expected = brute_force.best(allowed, 3)
  chex.assert_trees_all_equal(np.asarray(routing.experts), expected)
  chex.assert_trees_all_close(routing.gates, np.take_along_axis(probs, expected, -1), atol=1e-6)


def test_all_groups_are_no_limit():
  each = lambda x, limit: [top_k_routing(x, k=k, limit=limit) for k in (1, 6)]
  run = jax.jit(lambda x: (each(x, GroupLimit(3, 3)), each(x, None)))
  limited, free = run(normal(5, 6))
  chex.assert_trees_all_equal(limited, free)


@pytest.mark.parametrize(
  ("limit", "k"), [((4, 1), 1), ((3, 1), 3), ((3, 1, 3), 1), ((3, 4), 1), ((0, 1), 1)]
)
def test_groups_that_do_not_fit(limit, k):
  with pytest.raises(ValueError, match=r"GroupLimit: .*; allowed: "):
    top_k_routing(jnp.zeros((2, 6)), k=k, limit=GroupLimit(*limit))


def test_one_expert_and_no_rows():
  routing = top_k_routing(jnp.zeros((0, 1)), k=1)
  assert routing.experts.shape == routing.gates.shape == (0, 1)
  assert top_k_routing(jnp.full((2, 1), -5.0), k=1).gates.tolist() == [[1.0], [1.0]]
