import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.layers.forward import layer_means
from effjax.train import next_token, perplexity
from tests.modules import apply, random_params


def test_masked_loss_is_the_mean_over_what_counts(bigram, stream):
  module, params, objective = bigram()
  batch = next(stream())
  loss, metrics = jax.jit(objective)(params, batch, None)
  logits = np.asarray(apply(module, params, batch["tokens"]), np.float64)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nll = -np.take_along_axis(logp, batch["targets"][..., None], -1)[..., 0]
  expected = (nll * batch["weights"]).sum() / batch["weights"].sum()
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert float(metrics["weight"]) == batch["weights"].sum()


def test_logits_of_half_precision_are_compared_in_float32():
  objective = next_token(nn.Embed(2, 2, dtype=jnp.bfloat16))
  batch = {"tokens": jnp.array([[0]]), "targets": jnp.array([[1]])}
  loss, _ = objective({"embedding": jnp.array([[0.5, 0.25], [0.0, 0.0]])}, batch, None)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, np.log(np.exp(0.25) + 1), rtol=1e-6)


def test_a_masked_target_has_no_influence(bigram, stream):
  _, params, objective = bigram()
  batch = next(stream())
  targets = np.where(batch["weights"] == 0, 0, batch["targets"])
  grad = jax.jit(jax.grad(lambda p, b: objective(p, b, None)[0]))
  same = jax.tree.map(
    np.array_equal, grad(params, batch), grad(params, {**batch, "targets": targets})
  )
  assert all(jax.tree.leaves(same))


def test_sown_losses_are_added_and_reported(bigram, stream):
  _, params, objective = bigram(coefficient=0.5)
  loss, metrics = jax.jit(objective)(params, next(stream()), None)
  np.testing.assert_allclose(loss, metrics["nll"] + metrics["size"], rtol=1e-6)
  assert float(metrics["size"]) > 0 and "mean" in metrics


def test_a_scanned_layer_counts_as_its_repeats():
  sown = {
    "segments_0": {"balance": (jnp.array([1.0, 2.0, 3.0]),)},
    "last": {"balance": (jnp.array(6.0),)},
  }
  assert float(layer_means(sown)["balance"]) == 3.0


def test_randomness_is_on_with_a_key_only(stream):
  class Noisy(nn.Module):
    @nn.compact
    def __call__(self, tokens):
      logits = nn.Embed(11, 11)(tokens)
      if self.has_rng("dropout"):
        logits += jax.random.normal(self.make_rng("dropout"), logits.shape)
      return logits

  params = random_params(Noisy(), np.zeros((1, 2), np.int32))
  objective, batch = jax.jit(next_token(Noisy())), next(stream())
  still = [float(objective(params, batch, None)[0]) for _ in range(2)]
  noisy = [float(objective(params, batch, jax.random.key(i))[0]) for i in range(2)]
  assert still[0] == still[1] and len({still[0], *noisy}) == 3


@pytest.mark.parametrize("nll, expected", [(np.log(7.0), 7.0), (1e4, np.inf)])
def test_perplexity(nll, expected):
  assert perplexity(nll) == pytest.approx(expected)


def test_the_perplexity_of_no_number_is_none():
  assert np.isnan(perplexity(float("nan"))) and perplexity(np.float32(0)) == 1
