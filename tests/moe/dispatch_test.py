"""Sorting tokens by expert and back."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from effjax.moe.dispatch import mix_experts
from effjax.moe.plan import sort_by_expert
from tests.modules import normal

sort_by_four = jax.jit(lambda experts: sort_by_expert(experts, 4))


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(experts=st.lists(st.integers(0, 4), min_size=8, max_size=8))
def test_sorting_is_stable_and_counts(experts):
  order, sizes = sort_by_four(np.array(experts, np.int32))
  assert np.asarray(order).tolist() == sorted(range(8), key=lambda i: experts[i])
  assert np.asarray(sizes).tolist() == [experts.count(e) for e in range(4)]


def scale_by_expert(factors):
  """Experts that multiply by a number each."""

  def apply(rows, groups):
    expert = groups.of_row(rows.shape[0])
    return rows * jnp.take(factors, expert, mode="fill", fill_value=0)[:, None]

  return apply


def test_mixture_and_gradients_equal_the_definition():
  x = normal(6, 3)
  experts = jnp.array([[0, 1], [2, 0], [1, 2], [2, 1], [0, 2], [1, 0]])
  gates, factors = np.abs(normal(6, 2, seed=1)), jnp.array([1.0, -2.0, 3.0])

  def ours(x, gates, factors):
    return mix_experts(scale_by_expert(factors), x, experts, gates, count=3)

  def definition(x, gates, factors):
    return x * (gates * factors[experts]).sum(-1, keepdims=True)

  def evaluate(mix):
    loss = lambda *args: jnp.sin(mix(*args)).sum()
    run = jax.jit(lambda *args: (mix(*args), jax.grad(loss, (0, 1, 2))(*args)))
    return run(x, gates, factors)

  (found, slopes), (expected, wanted) = evaluate(ours), evaluate(definition)
  chex.assert_trees_all_close(found, expected, atol=1e-6)
  chex.assert_trees_all_close(slopes, wanted, atol=1e-5)


def test_masked_tokens_are_not_computed():
  x, mask = normal(4, 3), np.array([True, False, True, False])
  experts = np.array([[1], [1], [0], [0]])

  @jax.jit
  def run(x, experts, mask):
    seen = []

    def apply(rows, groups):
      seen.append(groups.sizes[0])
      return rows + 1

    return mix_experts(apply, x, experts, jnp.ones((4, 1)), count=2, mask=mask), seen

  y, seen = jax.tree.map(np.asarray, run(x, experts, mask))
  assert [sizes.tolist() for sizes in seen] == [[1, 1]]
  assert not y[~mask].any()
  chex.assert_trees_all_close(y[mask], np.asarray(x)[mask] + 1, atol=1e-6)


def test_what_is_no_expert_and_what_is_masked_have_no_influence():
  x, dy, factors = normal(4, 3), normal(4, 3, seed=1), jnp.array([2.0, -1.0])
  token = np.array([True, True, True, False])

  @jax.jit
  def run(x, experts, gates, dy):
    mix = lambda x, gates, factors: mix_experts(
      scale_by_expert(factors), x, experts, gates, count=2, mask=jnp.asarray(token)
    )
    y, pull = jax.vjp(mix, x, gates, factors)
    return y, *pull(dy)

  experts, gates = np.array([[0, 2], [-1, 1], [5, -9], [0, 1]]), np.ones((4, 2), np.float32)
  clean = y, dx, d_gates, _ = run(x, experts, gates, dy)
  expected = np.array([2, -1, 0, 0])[:, None] * np.asarray(x)
  chex.assert_trees_all_close(y, expected, atol=1e-6)
  assert not dx[2:].any() and not d_gates[2:].any()
  for fill in np.float32([np.nan, np.inf, 1e30]):
    spoil = lambda a, fill=fill: np.where(token[:, None], a, fill)
    unused = np.where((experts >= 0) & (experts < 2) & token[:, None], gates, fill)
    chex.assert_trees_all_equal(run(spoil(x), experts, unused, spoil(dy)), clean)
  assert not any(np.asarray(a).any() for a in run(x, np.full((4, 2), 2), gates, dy))
