"""Experts that choose their tokens, against loops."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import masks
from effjax.attention.multi_head import Attention
from effjax.layers import MLP, Context, ExpertRouting, LayerSpec, TransformerConfig
from effjax.moe import BatchPriority, Capacity, ExpertChoice, MoE, expert_choice_routing
from tests.modules import normal
from tests.moe import brute_force

M, E = 24, 4
MASK = np.random.default_rng(3).random(M) < 0.5


@jax.jit
def chosen(logits, mask):
  return {
    (capacity, masked): expert_choice_routing(
      logits, capacity=capacity, mask=mask if masked else None
    )
    for capacity in (5, M, 2 * M)
    for masked in (False, True)
  }


@pytest.mark.parametrize("seed", range(3))
def test_each_expert_takes_its_best_tokens(seed):
  logits = normal(M, E, seed=seed)
  poisoned = np.where(MASK[:, None], logits, np.float32(np.nan))
  for given in (logits, poisoned):
    for (capacity, masked), routing in chosen(given, MASK).items():
      if masked or given is logits:
        rows, gates = brute_force.expert_choice(logits, capacity, MASK if masked else None)
        chex.assert_trees_all_equal(np.asarray(routing.rows), rows)
        chex.assert_trees_all_close(routing.gates, gates, atol=1e-6)


def test_order_is_kept_where_probabilities_are_too_small():
  logits = jnp.array([[0.0, -300.0], [0.0, -200.0], [0.0, -400.0], [0.0, -150.0]])
  routing = expert_choice_routing(logits, capacity=3)
  assert routing.rows.tolist() == [[0, 1, 2], [3, 1, 0]]


@jax.jit
def routed(params, rows, mask):
  router = ExpertChoice(E, capacity=Capacity(1.5), z=0.5, mutual_information=0.25)
  variables = {"params": params}
  return router.apply(variables, rows, Context(), mask, mutable=["losses", "metrics", "statistics"])


def test_the_router_says_which_rows_and_how_many_tokens_none_takes():
  rows = normal(M, 6)
  params = {"kernel": normal(6, E, seed=1)}
  routing, sown = routed(params, np.where(MASK[:, None], rows, np.float32(np.nan)), MASK)
  assert isinstance(routing, ExpertRouting) and routing.rows.shape == (E, 9)
  expected, _ = brute_force.expert_choice(rows @ params["kernel"], 9, MASK)
  chex.assert_trees_all_equal(np.asarray(routing.rows), expected)
  missed = set(np.flatnonzero(MASK)) - set(expected.ravel())
  found = float(sown["metrics"]["dropped_share"][0])
  assert found == pytest.approx(len(missed) / MASK.sum())
  assert set(sown["losses"]) == {"router_z", "mutual_information"}
  chex.assert_trees_all_close(sown["statistics"]["load"][0], np.full(E, 0.25))


@pytest.mark.parametrize("router", [ExpertChoice(4), BatchPriority(4, 2)])
def test_it_is_refused_in_a_decoder(router):
  model = lambda mixer: TransformerConfig(11, 8, (LayerSpec(mixer, MoE(router, MLP(8))),))
  with pytest.raises(ValueError, match=f"layer 0: ffn has {type(router).__name__}, .* causal"):
    model(Attention(2))
  model(Attention(2, mask=masks.Full()))


def test_bad_arguments():
  with pytest.raises(ValueError, match="capacity=0; allowed: from 1"):
    expert_choice_routing(jnp.zeros((3, 2)), capacity=0)
  with pytest.raises(ValueError, match=r"mask \(2,\); allowed: \(3,\)"):
    expert_choice_routing(jnp.zeros((3, 2)), capacity=1, mask=jnp.ones(2, bool))
  assert expert_choice_routing(jnp.zeros((0, 2)), capacity=1).rows.shape == (2, 0)
