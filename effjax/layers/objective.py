"""Objectives: pure functions objective(params, batch, rng) -> (loss, metrics).

A loss is a mean over something, and `metrics["weight"]` says over how much (tokens, pairs): by it
a training step averages microbatches, so that the mean is that of the whole batch. Without it
microbatches count alike. Where a training state has something `extra`, an objective takes that as
its fourth argument.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from effjax.core.numerics import weighted_mean, zero_unless
from effjax.core.typing import Array, Float, Key, Params, PyTree
from effjax.layers.forward import forward, layer_means, sown_values

Batch = Mapping[str, Array | np.ndarray]
Objective = Callable[..., tuple[Array, dict[str, Array]]]
TokenLoss = Callable[..., tuple[Float[Array, "B T"], dict[str, Float[Array, "B T"]]]]


def per_token(
  module: nn.Module,
  loss: TokenLoss,
  *,
  reads: Sequence[str] = ("targets",),
  reads_extra: bool = False,
) -> Objective:
  """Σ w·loss(token) / Σ w, plus what the layers sow under "losses".

  The batch has tokens [B, T] and what `loss` reads; optional are weights [B, T] (0: not counted)
  and every field of `Context`. A sown loss carries its coefficient; each kind is averaged over the
  layers that sow it. `rng` None switches the randomness of layers off.

  Args:
    module: tokens → output, logits most often.
    loss: (output, batch) → values [B, T], and by name more values [B, T] that are only reported. A
      value is of its position alone: where the weight is 0, `output` and what `loss` reads of the
      batch are given as zeros, so that NaN in them has no influence.
      Arrays that it holds should be a `jax.tree_util.Partial`'s: they are then arguments of a
      jitted step and not constants in it.
    reads: entries of the batch that `loss` reads.
    reads_extra: whether `loss` takes the `extra` of a training state as its third argument.

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
  return Partial(functools.partial(_per_token, module, tuple(reads), reads_extra), loss)


def _per_token(
  module: nn.Module,
  reads: tuple[str, ...],
  reads_extra: bool,
  loss: Partial,
  params: Params,
  batch: Batch,
  rng: Key | None,
  *extra: PyTree,
) -> tuple[Array, dict[str, Array]]:
  output, sown = forward(module, params, batch, rng, read=(*reads, "weights"))
  weights = batch.get("weights")
  seen = {name: batch[name] for name in reads if name in batch}
  output, seen = _counted((output, seen), weights)
  values, reported = loss(output, {**batch, **seen}, *(extra if reads_extra else ()))
  metrics = {name: weighted_mean(x, weights) for name, x in reported.items()}
  added = layer_means(sown.get("losses", {})).values()
  total = sum(added, start=weighted_mean(values, weights))
  weight = jnp.asarray(jnp.ones(values.shape) if weights is None else weights, jnp.float32).sum()
  return total, {**sown_values(sown), **metrics, "weight": weight}


def _counted(tree: PyTree, weights: Array | np.ndarray | None) -> PyTree:
  """`tree` with zeros at the positions [B, T] of weight 0, in the arrays that have positions."""
  if weights is None:
    return tree
  keep = lambda x: zero_unless(jnp.asarray(weights) != 0, jnp.asarray(x))
  return jax.tree.map(lambda x: keep(x) if tuple(x.shape[:2]) == tuple(weights.shape) else x, tree)


def through(
  objective: Objective, view: Callable[..., PyTree], *, reads_extra: bool = False
) -> Objective:
  """The objective of view(params): what trains is one tree, what computes another.

  Factors that layers share, masks over weights, learned mixtures of adapters and low-precision
  copies of parameters are views; the trained model is deployed as view(params).

  Args:
    objective: of the model's parameters.
    view: trained parameters → the model's.
    reads_extra: whether `view` takes the `extra` of a training state as its second argument.

  Example:
    >>> objective = lambda params, batch, rng: (params["w"].sum(), {})
    >>> shared = through(objective, lambda params: {"w": jnp.stack([params["w"]] * 3)})
    >>> float(shared({"w": jnp.ones(2)}, {}, None)[0])
    6.0
  """
  objective = objective if isinstance(objective, Partial) else Partial(objective)
  view = view if isinstance(view, Partial) else Partial(view)
  return Partial(functools.partial(_through, reads_extra), objective, view)


def _through(reads_extra: bool, objective, view, params, batch, rng, *extra: PyTree):
  return objective(view(params, *(extra if reads_extra else ())), batch, rng, *extra)
