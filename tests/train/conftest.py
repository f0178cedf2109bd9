"""A tiny model and a tiny stream of batches, so that these tests stand without models and data."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.train import LoopConfig, fit, init_state, make_train_step, next_token


class Bigram(nn.Module):
  """Logits of the next token from the token alone; sows a loss and a metric."""

  vocab: int = 11
  width: int = 8
  coefficient: float = 0.0

  @nn.compact
  def __call__(self, tokens, *, segment_ids=None, positions=None):
    x = nn.Embed(self.vocab, self.width, name="embed")(tokens)
    if self.coefficient:
      self.sow("losses", "size", self.coefficient * jnp.square(x).mean())
      self.sow("metrics", "mean", x.mean())
    x = nn.LayerNorm(name="norm")(nn.tanh(nn.Dense(self.width, name="up")(x)))
    return nn.Dense(self.vocab, name="head")(x)


class Stream:
  """Batch i is a function of the seed and i."""

  def __init__(self, rows=8, length=6, seed=0, poison=None):
    self.index, self.shape, self.seed, self.poison = 0, (rows, length + 1), seed, poison

  def __next__(self):
    draw = np.random.default_rng([self.seed, self.index])
    self.index += 1
    tokens = np.cumsum(draw.integers(1, 3, self.shape), axis=1) % 11
    weights = draw.integers(0, 2, (self.shape[0], self.shape[1] - 1)).astype(np.float32)
    if self.index == self.poison:
      weights[0, 0] = np.nan
    tokens = tokens.astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}

  def get_state(self):
    return {"index": self.index}

  def set_state(self, state):
    self.index = state["index"]


@pytest.fixture(scope="session")
def stream():
  return Stream


@functools.cache
def make_bigram(**arguments):
  module = Bigram(**arguments)
  init = jax.jit(module.init)
  params = init(jax.random.key(1), np.zeros((1, 2), np.int32))["params"]
  return module, jax.tree.map(np.asarray, params), next_token(module)


@pytest.fixture(scope="session")
def bigram():
  """(module, params, objective) of a Bigram; keywords go to it."""
  return make_bigram


@functools.cache
def make_step(learning_rate=0.03, *, microbatches=1, adam=True, **arguments):
  optimizer = (optax.adam if adam else optax.sgd)(learning_rate)
  objective = make_bigram(**arguments)[2]
  return optimizer, make_train_step(objective, optimizer, microbatches=microbatches)


@pytest.fixture(scope="session")
def bigram_step():
  """(optimizer, step) for a Bigram, the same for the same arguments."""
  return make_step


@pytest.fixture
def run(key):
  """run(workdir, steps, …) -> state: a short training; `how` goes to `make_step`."""

  def run(workdir, steps=9, *, batches=None, evaluate=None, rng=key, scale=1, how=(), **arguments):
    config = LoopConfig(steps=steps, progress=False, **{"checkpoint_every": 3, **arguments})
    optimizer, step = make_step(**dict(how))
    params = jax.tree.map(lambda x: jnp.array(scale * x), make_bigram()[1])
    state, batches = init_state(params, optimizer), batches or Stream()
    return fit(step, state, batches, rng, workdir=workdir, config=config, evaluate=evaluate)

  return run
