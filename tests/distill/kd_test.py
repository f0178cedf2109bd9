import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from effjax.distill import divergence, kd_loss, kd_objective


def logits(seed, shape=(2, 5, 7), scale=3.0):
  return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


STUDENT, TEACHER = logits(0), logits(1)
TARGETS = jnp.asarray(np.random.default_rng(2).integers(0, 7, (2, 5)), jnp.int32)
WEIGHTS = jnp.array([[1.0] * 5, [1.0] * 2 + [0.0] * 3])
FORMS = [*itertools.product((0.5, 1, 4.0), (0, 0.3, 1))]


@jax.jit
def losses(student):
  """Loss and gradient for each temperature and alpha."""
  loss = lambda student, temperature, alpha: kd_loss(
    student, TEACHER, TARGETS, temperature=temperature, alpha=alpha, weights=WEIGHTS
  )
  return {form: jax.value_and_grad(loss)(student, *form) for form in FORMS}


@pytest.mark.parametrize(("temperature", "alpha"), FORMS)
def test_loss_and_gradient_equal_torch(temperature, alpha):
  torch = pytest.importorskip(
    "torch", reason="peer comparisons run on Python 3.11, which has torch"
  )
  F = torch.nn.functional
  tensor = lambda x: torch.from_numpy(np.array(x))
  student = tensor(STUDENT).requires_grad_()
  keep = tensor(WEIGHTS).bool()
  soft = F.kl_div(
    F.log_softmax(student[keep] / temperature, -1),
    F.log_softmax(tensor(TEACHER)[keep] / temperature, -1),
    reduction="batchmean",
    log_target=True,
  )
  hard = F.cross_entropy(student[keep], tensor(TARGETS).long()[keep])
  expected = alpha * temperature**2 * soft + (1 - alpha) * hard
  expected.backward()

  value, grad = losses(STUDENT)[temperature, alpha]
  np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
  np.testing.assert_allclose(grad, student.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_divergence_equals_float64():
  p, q = (np.asarray(x, np.float64) / 2 for x in (TEACHER, STUDENT))
  p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (p, q))
  expected = (p * np.log(p / q)).sum(-1)
  np.testing.assert_allclose(divergence(STUDENT, TEACHER, 2.0), expected, rtol=1e-4, atol=1e-6)


def test_the_teacher_gets_no_gradient():
  grad = jax.jit(jax.grad(lambda teacher: kd_loss(STUDENT, teacher, TARGETS, alpha=1.0)))
  assert not np.asarray(grad(TEACHER)).any()


def test_a_student_that_is_the_teacher_has_nothing_to_learn_from_it():
  loss = lambda student: kd_loss(student, TEACHER, TARGETS, temperature=3.0, alpha=1.0)
  value, grad = jax.jit(jax.value_and_grad(loss))(TEACHER)
  assert abs(float(value)) < 1e-5
  assert np.abs(grad).max() < 1e-6


def test_tokens_the_teacher_excludes_do_not_make_nan():
  masked = jnp.asarray(np.where(np.arange(7) == 0, -np.inf, TEACHER))
  grad = jax.jit(jax.value_and_grad(lambda x: kd_loss(x, masked, TARGETS, alpha=1.0)))
  chex.assert_tree_all_finite(grad(STUDENT))


def test_what_has_no_weight_does_not_matter():
  changed = np.where(WEIGHTS[..., None] == 0, np.float32(99), STUDENT)
  loss = jax.jit(lambda student, weights: kd_loss(student, TEACHER, TARGETS, weights=weights))
  assert float(loss(changed, WEIGHTS)) == float(loss(STUDENT, WEIGHTS))
  assert float(loss(STUDENT, np.zeros((2, 5), np.float32))) == 0.0


def test_half_precision_logits_are_compared_in_float32():
  half, loss = lambda x: jnp.asarray(np.asarray(x), jnp.bfloat16), jax.jit(kd_loss)
  value = loss(half(STUDENT), half(TEACHER), TARGETS)
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, loss(STUDENT, TEACHER, TARGETS), rtol=0.02)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"temperature": 0}, "temperature 0; allowed: above 0"),
    ({"alpha": 1.5}, "alpha 1.5; allowed: 0 … 1"),
  ],
)
def test_bad_numbers_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    kd_loss(STUDENT, TEACHER, TARGETS, **arguments)
  with pytest.raises(ValueError, match=message):
    kd_objective(nn.Embed(2, 2), nn.Embed(2, 2), {}, **arguments)


def test_shapes_that_differ_are_refused():
  unchecked = kd_loss.__wrapped__ if hasattr(kd_loss, "__wrapped__") else kd_loss
  with pytest.raises(ValueError, match=r"teacher_logits \(2, 5, 6\) differ"):
    unchecked(STUDENT, TEACHER[..., :6], TARGETS)


class Bigram(nn.Module):
  """Logits from the last token alone; sows a loss, and noise where it is given randomness."""

  @nn.compact
  def __call__(self, tokens, segment_ids=None, positions=None):
    self.sow("losses", "balance", jnp.float32(0.25))
    y = nn.Embed(7, 7)(tokens)
    return nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(y)


BATCH = {"tokens": TARGETS, "targets": (TARGETS + 1) % 7, "weights": WEIGHTS}


def test_objective_is_the_loss_of_the_two_modules_plus_what_is_sown():
  module = Bigram()
  params, taught = ({"Embed_0": {"embedding": logits(i, (7, 7))}} for i in (3, 4))
  objective = kd_objective(module, module, taught, temperature=2.0, alpha=0.7)
  run = jax.jit(objective)
  loss, metrics = run(params, BATCH, None)
  table = lambda tree: jnp.asarray(np.asarray(tree["Embed_0"]["embedding"])[BATCH["tokens"]])
  expected = kd_loss(
    table(params), table(taught), BATCH["targets"], temperature=2.0, alpha=0.7, weights=WEIGHTS
  )
  np.testing.assert_allclose(loss, expected + 0.25, rtol=1e-6)
  assert set(metrics) == {"nll", "divergence", "weight", "balance"}
  assert float(metrics["weight"]) == 7
  noisy, _ = run(params, BATCH, jax.random.key(0))
  assert float(noisy) != float(loss)


def test_objective_carries_the_teacher_as_arguments_of_the_program():
  module = Bigram()
  taught = {"Embed_0": {"embedding": logits(4, (7, 7))}}
  objective = kd_objective(module, module, taught)
  assert isinstance(objective, Partial)
  chex.assert_trees_all_equal(jax.tree.leaves(objective), jax.tree.leaves(taught))
  run = jax.jit(lambda objective, params: objective(params, BATCH, None)[0])
  eager = objective(taught, BATCH, None)[0]
  np.testing.assert_allclose(run(objective, taught), eager, rtol=1e-6)


def test_training_brings_the_student_to_the_teacher():
  module = Bigram()
  params, taught = ({"Embed_0": {"embedding": logits(i, (7, 7), 1.0)}} for i in (3, 4))
  batch = {"tokens": jnp.array([[*range(7)]]), "targets": jnp.array([[0] * 7])}
  objective = kd_objective(module, module, taught, temperature=2.0, alpha=1.0)
  optimizer = optax.adam(0.1)

  @jax.jit
  def step(params, state):
    grads, metrics = jax.grad(objective, has_aux=True)(params, batch, None)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, metrics

  state = optimizer.init(params)
  for _ in range(150):
    params, state, metrics = step(params, state)
  assert float(metrics["divergence"]) < 1e-3


@pytest.mark.parametrize("temperature", [1e-38, 1e-3, 20.0, 1e3, 1e9])
def test_the_loss_has_its_limits_at_any_temperature(temperature):
  softmax = lambda z: np.exp(z - z.max(-1, keepdims=True)) / np.exp(
    z - z.max(-1, keepdims=True)
  ).sum(-1, keepdims=True)  # fmt: skip
  student, teacher = np.asarray(STUDENT, np.float64), np.asarray(TEACHER, np.float64)
  apart = softmax(student / temperature) - softmax(teacher / temperature)
  loss = lambda x: kd_loss(x, TEACHER, TARGETS, temperature=temperature, alpha=1.0)
  value, grad = jax.jit(jax.value_and_grad(loss))(STUDENT)
  np.testing.assert_allclose(grad, temperature * apart / TARGETS.size, rtol=1e-4, atol=1e-7)
  if temperature >= 1e3:  # half the variance of the difference over the vocabulary
    expected = (teacher - student).var(-1).mean() / 2
    np.testing.assert_allclose(value, expected, rtol=0.01 if temperature < 1e9 else 1e-5)
  assert np.isfinite(value) and value >= 0
