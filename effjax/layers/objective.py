"""Objectives: pure functions objective(params, batch, rng) -> (loss, metrics).

A loss is a mean over something, and `metrics["weight"]` says over how much (tokens, pairs): by it
a training step averages microbatches, so that the mean is that of the whole batch. Without it
microbatches count alike. An objective for a state with something `extra` takes that as its fourth
argument.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from effjax.core.numerics import weighted_mean
from effjax.core.typing import Array, Float, Key, Params, PyTree
from effjax.layers.forward import forward, layer_means, sown_values

Batch = Mapping[str, Array | np.ndarray]
Objective = Callable[..., tuple[Array, dict[str, Array]]]
TokenLoss = Callable[..., tuple[Float[Array, "B T"], dict[str, Float[Array, "B T"]]]]


def per_token(module: nn.Module, loss: TokenLoss) -> Objective:
  """Σ w·loss(token) / Σ w, plus what the layers sow under "losses".

  The batch has tokens [B, T] and what `loss` reads; optional are weights [B, T] (0: not counted)
  and every field of `Context`. A sown loss carries its coefficient; each kind is averaged over the
  layers that sow it. `rng` None switches the randomness of layers off.

  Args:
    module: tokens → output, logits most often.
    loss: (output, batch[, extra]) → values [B, T], and by name more values [B, T] that are only
      reported. Arrays that it holds should be a `jax.tree_util.Partial`'s: they are then arguments
      of a jitted step and not constants in it.

  Returns:
    An objective. Metrics: the weighted mean of what `loss` reports, "weight" (Σ w), and what
    `forward.sown_values` makes of sown losses, metrics and statistics.

  Example:
    >>> module = nn.Embed(3, 3, embedding_init=nn.initializers.ones)
    >>> params, batch = {"embedding": jnp.ones((3, 3))}, {"tokens": jnp.array([[0, 1]])}
    >>> objective = per_token(module, lambda output, batch: (output[..., 0], {}))
    >>> float(objective(params, batch, None)[0])
    1.0
  """
  loss = loss if isinstance(loss, Partial) else Partial(loss)
  return Partial(functools.partial(_per_token, module), loss)


def _per_token(
  module: nn.Module, loss: Partial, params: Params, batch: Batch, rng: Key | None, *extra: PyTree
) -> tuple[Array, dict[str, Array]]:
  output, sown = forward(module, params, batch, rng)
  values, reported = loss(output, batch, *extra)
  weights = batch.get("weights", jnp.ones(values.shape, values.dtype))
  metrics = {name: weighted_mean(x, weights) for name, x in reported.items()}
  added = layer_means(sown.get("losses", {})).values()
  total = sum(added, start=weighted_mean(values, weights))
  return total, {**sown_values(sown), **metrics, "weight": weights.sum()}


def through(objective: Objective, view: Callable[..., PyTree]) -> Objective:
  """The objective of view(params): what trains is one tree, what computes another.

  Factors that layers share, masks over weights, learned mixtures of adapters and low-precision
  copies of parameters are views; the trained model is deployed as view(params).

  Args:
    objective: of the model's parameters.
    view: trained parameters → the model's; with an `extra` it gets that as its second argument.

  Example:
    >>> objective = lambda params, batch, rng: (params["w"].sum(), {})
    >>> shared = through(objective, lambda params: {"w": jnp.stack([params["w"]] * 3)})
    >>> float(shared({"w": jnp.ones(2)}, {}, None)[0])
    6.0
  """
  objective = objective if isinstance(objective, Partial) else Partial(objective)
  view = view if isinstance(view, Partial) else Partial(view)
  return Partial(_through, objective, view)


def _through(objective, view, params, batch, rng, *extra: Any):
  return objective(view(params, *extra), batch, rng, *extra)
