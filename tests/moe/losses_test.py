"""Balance losses against enumeration and against transformers."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.moe import expert_shares, load_balance_loss, top_k_routing, z_loss
from tests.modules import normal


def enumerated(probs, experts, mask, normalization):
  """The loss counted token by token and choice by choice."""
  E, k = probs.shape[-1], experts.shape[-1]
  tokens = [t for t in range(len(probs)) if mask is None or mask[t]]
  choices = 1 if normalization == "gshard" else k
  counts = np.zeros(E)
  for t, i in itertools.product(tokens, range(choices)):
    counts[experts[t, i]] += 1
  per_token = k if normalization == "deepseek" else 1
  share = counts / (len(tokens) * per_token)
  return E * sum(share[e] * np.mean([probs[t, e] for t in tokens]) for e in range(E))


NORMALIZATIONS = ("deepseek", "switch", "gshard")


@jax.jit
def balanced(logits, mask):
  """Probabilities and experts for each k; each normalisation's loss, with and without mask."""
  found = {k: top_k_routing(logits, k=k) for k in (1, 2, 3)}
  losses = {
    (name, k, masked): load_balance_loss(
      routing.probs, routing.experts, mask=mask if masked else None, normalization=name
    )
    for k, routing in found.items()
    for name in NORMALIZATIONS
    for masked in (False, True)
  }
  return {k: (routing.probs, routing.experts) for k, routing in found.items()}, losses


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_load_balance_equals_enumeration(normalization, k, masked):
  mask = np.random.default_rng(0).random(17) < 0.6
  found, losses = jax.tree.map(np.asarray, balanced(normal(17, 5), mask))
  mask = mask if masked else None
  expected = enumerated(*found[k], mask, normalization)
  assert float(losses[normalization, k, masked]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
  ("normalization", "expected"), [("deepseek", 1), ("switch", 2), ("gshard", 1)]
)
def test_uniform_routing(normalization, expected):
  experts = jnp.array(list(itertools.permutations(range(4), 2)))
  probs = jnp.full((len(experts), 4), 0.25)
  loss = load_balance_loss(probs, experts, normalization=normalization)
  assert float(loss) == pytest.approx(expected)


def test_collapsed_routing_costs_as_much_as_there_are_experts():
  probs = jnp.tile(jnp.array([[1.0, 0, 0, 0]]), (9, 1))
  loss = load_balance_loss(probs, jnp.zeros((9, 1), jnp.int32))
  assert float(loss) == pytest.approx(4.0)


def test_descending_the_loss_evens_the_load():
  logits = np.asarray(normal(64, 4)) + np.float32([2, 0, 0, -2])

  def loss(shift):
    routing = top_k_routing(logits + shift, k=1)
    worst = expert_shares(routing.experts, 4).max()
    return load_balance_loss(routing.probs, routing.experts), worst

  @jax.jit
  def step(shift):
    slope, worst = jax.grad(loss, has_aux=True)(shift)
    return shift - 0.3 * slope, worst

  shift = np.zeros((1, 4), np.float32)
  before = step(shift)[1]
  for _ in range(40):
    shift, _ = step(shift)
  assert step(shift)[1] < 0.6 * before


def test_masked_tokens_change_nothing_and_get_no_gradient():
  logits = normal(2, 6, 4)
  mask = np.array([[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0]], bool)

  @jax.jit
  @jax.value_and_grad
  def loss(logits):
    routing = top_k_routing(logits, k=2)
    balance = load_balance_loss(routing.probs, routing.experts, mask=jnp.asarray(mask))
    return balance + z_loss(logits, mask=jnp.asarray(mask))

  value, gradient = jax.tree.map(np.asarray, loss(logits))
  other, _ = loss(np.where(mask[..., None], logits, np.float32(5)))
  assert float(value) == pytest.approx(float(other), rel=1e-6)
  assert not gradient[~mask].any()
  assert gradient[mask].any()


def test_all_padding_costs_nothing():
  _, losses = balanced(np.ones((17, 5), np.float32), np.zeros(17, bool))
  assert losses["deepseek", 2, True] == 0.0
  assert jax.jit(z_loss)(np.ones((3, 4), np.float32), mask=np.zeros(3, bool)) == 0.0


def test_z_loss_equals_float64():
  logits = jnp.asarray(3 * np.asarray(normal(5, 7)))
  expected = np.mean(np.log(np.exp(np.asarray(logits, np.float64)).sum(-1)) ** 2)
  chex.assert_trees_all_close(jax.jit(z_loss)(logits), jnp.float32(expected), rtol=1e-5)


def test_losses_under_jit_equal_eager():
  logits = normal(8, 4)
  routing = top_k_routing(logits, k=2)
  chex.assert_trees_all_close(
    (jax.jit(load_balance_loss)(routing.probs, routing.experts), jax.jit(z_loss)(logits)),
    (load_balance_loss(routing.probs, routing.experts), z_loss(logits)),
    rtol=1e-6,
  )


def test_unknown_normalization():
  with pytest.raises(ValueError, match="normalization='mean'; allowed: deepseek, switch, gshard"):
    load_balance_loss(jnp.ones((1, 2)), jnp.zeros((1, 1), jnp.int32), normalization="mean")


@pytest.mark.parametrize("masked", [False, True])
def test_switch_equals_transformers(masked):
  torch = pytest.importorskip(
    "torch", reason="compares with transformers, which needs torch (3.11)"
  )
  from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

  logits = normal(3, 8, 6)
  mask = np.random.default_rng(0).random((3, 8)) < 0.7 if masked else None

  @jax.jit
  def loss(logits, mask):
    routing = top_k_routing(logits, k=2)
    return load_balance_loss(routing.probs, routing.experts, mask=mask, normalization="switch")

  ours = loss(logits, mask)
  theirs = load_balancing_loss_func(
    (torch.tensor(np.asarray(logits).reshape(24, 6)),),
    num_experts=6,
    top_k=2,
    attention_mask=None if mask is None else torch.tensor(np.asarray(mask, np.int64)),
  )
  assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_no_tokens_give_no_loss():
  none = jnp.zeros((0, 4))
  experts = jnp.zeros((0, 2), jnp.int32)
  assert float(load_balance_loss(none, experts)) == float(z_loss(none)) == 0
  assert not expert_shares(experts, 4).any()
