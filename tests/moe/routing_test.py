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

from effjax.moe import top_k_routing

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
