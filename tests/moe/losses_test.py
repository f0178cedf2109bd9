"""Balance losses against enumeration and against transformers."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.moe import (
  chosen_gates,
  expert_shares,
  importance_loss,
  load_balance_loss,
  load_loss,
  mutual_information_loss,
  noisy_top_k_routing,
  smooth_load,
  top_k_routing,
  z_loss,
)
from tests.modules import normal
from tests.moe import brute_force


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


@pytest.mark.parametrize("devices", [1, 2, 3, 6])
def test_balance_between_devices_equals_enumeration(devices):
  probs = brute_force.softmax(normal(20, 6))
  experts, size = brute_force.best(probs, 2), 6 // devices
  counts = np.array([(experts == e).sum() for e in range(6)])
  f, P = 6 / (2 * 20) * counts, probs.mean(0)
  groups = [range(d * size, (d + 1) * size) for d in range(devices)]
  expected = sum(np.mean([f[e] for e in g]) * sum(P[e] for e in g) for g in groups)
  loss = load_balance_loss(jnp.float32(probs), jnp.asarray(experts), devices=devices)
  assert float(loss) == pytest.approx(expected, rel=1e-5)


def variation(x):
  return np.var(x) / np.mean(x) ** 2


def test_importance_is_the_variation_of_sums_of_gates():
  logits, mask = normal(20, 5), np.arange(20) % 3 > 0

  @jax.jit
  def loss(logits, mask):
    routing = top_k_routing(logits, k=2)
    gates = chosen_gates(routing.experts, routing.gates, 5)
    return importance_loss(gates, mask=mask), importance_loss(routing.probs, mask=mask)

  sparse = np.zeros((20, 5))
  np.put_along_axis(sparse, *brute_force.top_k(logits, 2, True), 1)
  poisoned = np.where(mask[:, None], logits, np.float32(np.nan))
  chosen, dense = loss(poisoned, mask)
  assert float(chosen) == pytest.approx(variation(sparse[mask].sum(0)), rel=1e-5)
  assert float(dense) == pytest.approx(
    variation(brute_force.softmax(logits)[mask].sum(0)), rel=1e-5
  )
  assert not any(loss(poisoned, np.zeros(20, bool)))


NOISE = np.random.default_rng(0).normal(size=(20000, 6, 5)).astype(np.float32)


def test_the_smooth_load_is_what_noise_chooses_on_average():
  clean, stddev = normal(6, 5), jnp.abs(normal(6, 5, seed=1)) + 0.3
  noisy = np.asarray(clean) + np.asarray(stddev) * NOISE

  @jax.jit
  def loads(noisy):
    each = lambda k: jax.vmap(lambda noisy: smooth_load(clean, noisy, stddev, k=k))(noisy)
    return [each(k).mean(0) for k in (1, 2, 4)]

  place = np.argsort(np.argsort(-noisy, axis=-1), axis=-1)
  for k, load in zip((1, 2, 4), loads(noisy), strict=True):
    np.testing.assert_allclose(load, (place < k).mean(0), atol=0.01)
    np.testing.assert_allclose(np.asarray(load).sum(-1), k, rtol=0.01)


def test_the_smooth_load_is_the_probability_that_new_noise_of_one_expert_leaves_it_chosen():
  clean, stddev = normal(4, 5), jnp.abs(normal(4, 5, seed=1)) + 0.3
  noisy = clean + stddev * normal(4, 5, seed=2)
  drawn = np.asarray(clean)[..., None] + np.asarray(stddev)[..., None] * np.random.default_rng(
    0
  ).normal(size=(4, 5, 20000))
  for k, estimator in ((1, "shazeer"), (2, "shazeer"), (2, "v_moe")):
    others = np.asarray(noisy)[:, None].repeat(5, 1)
    if estimator == "shazeer":
      others = np.where(np.eye(5, dtype=bool), -np.inf, others)
    threshold = np.sort(others, axis=-1)[..., -k]
    found = smooth_load(clean, noisy, stddev, k=k, estimator=estimator)
    np.testing.assert_allclose(found, (drawn > threshold[..., None]).mean(-1), atol=0.015)


def test_the_smooth_load_of_logits_that_are_drawn_beside_it():
  clean, stddev = normal(64, 5), jnp.abs(normal(64, 5, seed=1)) + 0.3

  @jax.jit
  def run(key):
    noisy = noisy_top_k_routing(clean, stddev, key, k=2).logits
    return smooth_load(clean, noisy, stddev, k=2), noisy

  found, noisy = run(jax.random.key(0))
  chex.assert_trees_all_close(found, smooth_load(clean, noisy, stddev, k=2), atol=1e-6)


def test_the_load_loss_leaves_padding_out_and_has_a_gradient_in_clean_logits():
  clean, mask = normal(12, 4), np.arange(12) % 3 > 0
  noisy = clean + 0.5 * normal(12, 4, seed=1)

  @jax.jit
  @jax.value_and_grad
  def loss(clean, noisy, mask):
    return load_loss(clean, noisy, 0.5, k=2, mask=mask)

  spoil = lambda x: np.where(mask[:, None], x, np.float32(np.nan))
  value, slope = loss(spoil(clean), spoil(noisy), mask)
  load = np.asarray(smooth_load(clean[mask], noisy[mask], 0.5, k=2)).sum(0)
  assert float(value) == pytest.approx(variation(load), rel=1e-4)
  assert not slope[~mask].any() and np.abs(slope[mask]).min() > 0


def test_when_every_expert_is_chosen_the_load_is_even():
  clean = normal(5, 3)
  assert float(load_loss(clean, clean, 1.0, k=3)) == 0
  assert (smooth_load(clean, clean, 1.0, k=3) == 1).all()
  assert (smooth_load(clean, clean, 1.0, k=3, estimator="v_moe") < 1).any()


def test_mutual_information_equals_its_definition_and_is_finite_at_certainty():
  probs, mask = brute_force.softmax(3 * normal(20, 5)), np.arange(20) % 3 > 0
  entropy = lambda p: -(p * np.log(p)).sum(-1)
  loss = jax.jit(jax.value_and_grad(lambda x, mask: mutual_information_loss(x, mask=mask)))
  value, _ = loss(np.where(mask[:, None], probs, np.nan).astype(np.float32), mask)
  expected = entropy(probs[mask]).mean() - entropy(probs[mask].mean(0))
  assert float(value) == pytest.approx(expected, rel=1e-5)
  certain = jax.nn.one_hot(jnp.arange(20) % 4, 5)
  value, slope = loss(certain, np.ones(20, bool))
  assert float(value) == pytest.approx(-np.log(4), rel=1e-5) and np.isfinite(slope).all()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"k": 4}, "k=4; allowed: 1 … 3"),
    ({"k": 1, "estimator": "mine"}, "estimator='mine'; allowed: shazeer, v_moe"),
    ({"k": 1, "stddev": 0.0}, "stddev=0.0; allowed: above 0"),
    ({"k": 1, "noisy": jnp.zeros((2, 4))}, r"noisy \(2, 4\); allowed: \(2, 3\)"),
  ],
)
def test_bad_arguments_of_the_load(options, message):
  given = {"clean": jnp.zeros((2, 3)), "noisy": jnp.zeros((2, 3)), "stddev": 1.0} | options
  with pytest.raises(ValueError, match=message):
    load_loss(**given)


def test_devices_that_do_not_divide_the_experts():
  with pytest.raises(ValueError, match="devices=4; allowed: divisors of 6"):
    load_balance_loss(jnp.ones((1, 6)), jnp.zeros((1, 1), int), devices=4)
