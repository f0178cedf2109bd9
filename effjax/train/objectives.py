"""Objectives: pure functions objective(params, batch, rng) -> (loss, metrics).

A loss is a mean over something, and `metrics["weight"]` says over how much (tokens, pairs): by it
a training step averages microbatches, so that the mean is that of the whole batch. Without it
microbatches count alike.
"""

import math
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from effjax.core.numerics import cross_entropy, weighted_mean
from effjax.core.typing import Array, Key, Params
from effjax.layers.forward import forward, layer_means

Batch = Mapping[str, Array | np.ndarray]
Objective = Callable[[Params, Batch, Key | None], tuple[Array, dict[str, Array]]]


def next_token(module: nn.Module) -> Objective:
  """Σ w·(−log p(target)) / Σ w over the positions, plus what the layers sow under "losses".

  The batch has tokens [B, T] and targets [B, T]; optional are weights [B, T] (0: not counted),
  segment_ids and positions [B, T]. A sown loss carries its coefficient; each kind is averaged over
  the layers that sow it. Metrics: "nll" (the first term, nats), "weight" (Σ w), and every kind of
  sown loss and metric. `rng` None switches the randomness of layers off.

  Example:
    >>> objective = next_token(nn.Embed(3, 3, embedding_init=nn.initializers.zeros))
    >>> batch = {"tokens": jnp.array([[0, 1]]), "targets": jnp.array([[1, 2]])}
    >>> loss, _ = objective({"embedding": jnp.zeros((3, 3))}, batch, None)
    >>> round(float(loss), 4)
    1.0986
  """

  def objective(params: Params, batch: Batch, rng: Key | None):
    logits, sown = forward(module, params, batch, rng)
    values = cross_entropy(logits, batch["targets"])
    weights = batch.get("weights", jnp.ones(values.shape, values.dtype))
    nll = weighted_mean(values, weights)
    losses = layer_means(sown.get("losses", {}))
    metrics = layer_means(sown.get("metrics", {}))
    loss = sum(losses.values(), start=nll)
    return loss, {**metrics, **losses, "nll": nll, "weight": weights.sum()}

  return objective


def perplexity(nll: float) -> float:
  """exp of a mean negative log-likelihood in nats; infinity where that overflows.

  Example:
    >>> perplexity(0.0)
    1.0
  """
  return math.exp(nll) if nll < 700 else math.inf
