"""Objectives: pure functions objective(params, batch, rng) -> (loss, metrics).

A loss is a mean over something, and `metrics["weight"]` says over how much (tokens, pairs): by it
a training step averages microbatches, so that the mean is that of the whole batch. Without it
microbatches count alike.
"""

import math
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax.core.numerics import cross_entropy, weighted_mean
from effjax.core.typing import Array, Key, Params

Batch = Mapping[str, Array]
Objective = Callable[[Params, Batch, Key | None], tuple[Array, dict[str, Array]]]

RNG_STREAMS = ("dropout", "router", "mask")


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


def forward(module: nn.Module, params: Params, batch: Batch, rng: Key | None):
  """The module's output on a batch, and what its layers sowed.

  Only the arguments that the batch holds are passed, so any module of tokens [B, T] will do.
  """
  given = {name: batch[name] for name in ("segment_ids", "positions") if name in batch}
  rngs = {} if rng is None else dict(zip(RNG_STREAMS, jax.random.split(rng, 3), strict=True))
  kinds = ["losses", "metrics"]
  return module.apply({"params": params}, batch["tokens"], **given, rngs=rngs, mutable=kinds)


def layer_means(sown: Mapping) -> dict[str, Array]:
  """Name → mean over all layers, and all entries of scanned ones, that sowed under that name.

  Example:
    >>> layer_means({"a": {"z": (jnp.ones(3),)}, "b": {"z": (jnp.zeros(()),)}})
    {'z': Array(0.75, dtype=float32)}
  """
  found: dict[str, list[Array]] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(sown):
    name = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)][-1]
    found.setdefault(name, []).append(leaf.astype(jnp.float32).reshape(-1))
  return {name: jnp.concatenate(leaves).mean() for name, leaves in found.items()}


def perplexity(nll: float) -> float:
  """exp of a mean negative log-likelihood in nats; infinity where that overflows.

  Example:
    >>> perplexity(0.0)
    1.0
  """
  return math.exp(nll) if nll < 700 else math.inf
