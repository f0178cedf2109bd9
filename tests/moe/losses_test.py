"""Balance losses against enumeration and against transformers."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.moe import expert_shares, load_balance_loss, top_k_routing, z_loss


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


@pytest.mark.parametrize("normalization", ["deepseek", "switch", "gshard"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_load_balance_equals_enumeration(key, normalization, k, masked):
  routing = top_k_routing(jax.random.normal(key, (17, 5)), k=k)
  mask = jax.random.bernoulli(key, 0.6, (17,)) if masked else None
  got = load_balance_loss(routing.probs, routing.experts, mask=mask, normalization=normalization)
  expected = enumerated(
    *jax.tree.map(np.asarray, (routing.probs, routing.experts, mask)), normalization
  )
  assert float(got) == pytest.approx(expected, rel=1e-5)


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


def test_descending_the_loss_evens_the_load(key):
  logits = jax.random.normal(key, (64, 4)) + jnp.array([[2.0, 0, 0, -2]])

  def loss(shift):
    routing = top_k_routing(logits + shift, k=1)
    return load_balance_loss(routing.probs, routing.experts)

  worst = lambda shift: expert_shares(top_k_routing(logits + shift, k=1).experts, 4).max()
  shift = jnp.zeros((1, 4))
  before = worst(shift)
  step = jax.jit(lambda shift: shift - 0.3 * jax.grad(loss)(shift))
  for _ in range(40):
    shift = step(shift)
  assert worst(shift) < 0.6 * before


def test_masked_tokens_change_nothing_and_get_no_gradient(key):
  logits = jax.random.normal(key, (2, 6, 4))
  mask = jnp.array([[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0]], bool)

  def loss(logits):
    routing = top_k_routing(logits, k=2)
    return load_balance_loss(routing.probs, routing.experts, mask=mask) + z_loss(logits, mask=mask)

  other = jnp.where(mask[..., None], logits, 5.0)
  assert float(loss(logits)) == pytest.approx(float(loss(other)), rel=1e-6)
  gradient = np.asarray(jax.jit(jax.grad(loss))(logits))
  assert not gradient[~np.asarray(mask)].any()
  assert gradient[np.asarray(mask)].any()


def test_all_padding_costs_nothing():
  logits, mask = jnp.ones((3, 4)), jnp.zeros(3, bool)
  routing = top_k_routing(logits, k=2)
  assert float(load_balance_loss(routing.probs, routing.experts, mask=mask)) == 0.0
  assert float(z_loss(logits, mask=mask)) == 0.0


def test_z_loss_equals_float64(key):
  logits = 3 * jax.random.normal(key, (5, 7))
  expected = np.mean(np.log(np.exp(np.asarray(logits, np.float64)).sum(-1)) ** 2)
  chex.assert_trees_all_close(z_loss(logits), jnp.float32(expected), rtol=1e-5)


def test_losses_under_jit_equal_eager(key):
  logits = jax.random.normal(key, (8, 4))
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
def test_switch_equals_transformers(key, masked):
  torch = pytest.importorskip(
    "torch", reason="compares with transformers, which needs torch (3.11)"
  )
  from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

  logits = jax.random.normal(key, (3, 8, 6))
  mask = jax.random.bernoulli(key, 0.7, (3, 8)) if masked else None
  routing = top_k_routing(logits, k=2)
  ours = load_balance_loss(routing.probs, routing.experts, mask=mask, normalization="switch")
  theirs = load_balancing_loss_func(
    (torch.tensor(np.asarray(logits).reshape(24, 6)),),
    num_experts=6,
    top_k=2,
    attention_mask=None if mask is None else torch.tensor(np.asarray(mask, np.int64)),
  )
  assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
