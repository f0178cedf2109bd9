"""The objective of language modelling; `layers.objective` has what objectives are made of."""

import math

import flax.linen as nn

from effjax.core.numerics import cross_entropy
from effjax.core.typing import Array, Scalar
from effjax.layers.objective import Batch, Objective, per_token, through

__all__ = ["Batch", "Objective", "next_token", "per_token", "perplexity", "through"]


def next_token(module: nn.Module) -> Objective:
  """Σ w·(−log p(target)) / Σ w over the positions, plus what the layers sow under "losses".

  The batch has tokens [B, T] and targets [B, T]; see `per_token` for the rest. Metrics: "nll" (the
  first term, in nats and float32), and those of `per_token`.

  Example:
    >>> import jax.numpy as jnp
    >>> objective = next_token(nn.Embed(3, 3, embedding_init=nn.initializers.zeros))
    >>> batch = {"tokens": jnp.array([[0, 1]]), "targets": jnp.array([[1, 2]])}
    >>> loss, _ = objective({"embedding": jnp.zeros((3, 3))}, batch, None)
    >>> round(float(loss), 4)
    1.0986
  """
  return per_token(module, _nll)


def _nll(logits: Array, batch: Batch) -> tuple[Array, dict[str, Array]]:
  values = cross_entropy(logits, batch["targets"], batch.get("weights"))
  return values, {"nll": values}


def perplexity(nll: Scalar) -> float:
  """exp of a mean negative log-likelihood in nats; infinity where that overflows, NaN of NaN.

  Example:
    >>> perplexity(0.0)
    1.0
  """
  return math.inf if nll >= 700 else math.exp(nll)
