"""Sorting tokens by expert and back."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from effjax.moe.dispatch import mix_experts, sort_by_expert


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(experts=st.lists(st.integers(0, 4), min_size=8, max_size=8))
def test_sorting_is_stable_and_counts(experts):
  order, sizes = sort_by_expert(jnp.asarray(experts, jnp.int32), 4)
  assert np.asarray(order).tolist() == sorted(range(8), key=lambda i: experts[i])
  assert np.asarray(sizes).tolist() == [experts.count(e) for e in range(4)]


def scale_by_expert(factors):
  """Experts that multiply by a number each."""

  def apply(rows, sizes):
    return rows * jnp.repeat(factors, sizes, total_repeat_length=rows.shape[0])[:, None]

  return apply


def test_mixture_and_gradients_equal_the_definition(key):
  x = jax.random.normal(key, (6, 3))
  experts = jnp.array([[0, 1], [2, 0], [1, 2], [2, 1], [0, 2], [1, 0]])
  gates, factors = jax.random.uniform(key, (6, 2)), jnp.array([1.0, -2.0, 3.0])

  def ours(x, gates, factors):
    return mix_experts(scale_by_expert(factors), x, experts, gates, count=3)

  def definition(x, gates, factors):
    return x * (gates * factors[experts]).sum(-1, keepdims=True)

  chex.assert_trees_all_close(ours(x, gates, factors), definition(x, gates, factors), atol=1e-6)
  loss = lambda mix: jax.grad(lambda *args: jnp.sin(mix(*args)).sum(), (0, 1, 2))(x, gates, factors)
  chex.assert_trees_all_close(loss(ours), loss(definition), atol=1e-5)


def test_masked_tokens_are_not_computed(key):
  x, gates = jax.random.normal(key, (4, 3)), jnp.ones((4, 1))
  seen = []

  def apply(rows, sizes):
    seen.append(np.asarray(sizes).tolist())
    return rows + 1

  mask = jnp.array([True, False, True, False])
  y = mix_experts(apply, x, jnp.array([[1], [1], [0], [0]]), gates, count=2, mask=mask)
  assert seen == [[1, 1]]
  assert not np.asarray(y[~mask]).any()
  chex.assert_trees_all_close(y[mask], x[mask] + 1, atol=1e-6)
