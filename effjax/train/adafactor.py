"""Adafactor: a row and a column of second moments in place of a matrix.

Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
arXiv 1804.04235, Algorithm 4, without scaling by the size of parameters.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from effjax.core.typing import Array, PyTree

DECAY, EPSILON, THRESHOLD, FACTORED = 0.8, 1e-30, 1.0, 128


class AdafactorState(NamedTuple):
  """Steps taken, and of each array {"row", "column"} or {"square"}, its second moments."""

  count: Array
  moments: PyTree


def scale_by_adafactor(matrices: Callable[[PyTree], PyTree]) -> optax.GradientTransformation:
  """Gradients over their root mean square at their place, of root mean square 1 at most.

  With β = 1 − t^−0.8 and S = G² + 10⁻³⁰ for a matrix G [..., D, F] of D, F ≥ 128,
    r ← β r + (1 − β) mean_F S,  c ← β c + (1 − β) mean_D S,  U = G / √(r cᵀ / mean r);
  for others v ← β v + (1 − β) S and U = G / √v. Then U / max(1, rms U). Each matrix or vector is on
  its own: axes before them, of layers or experts, change nothing.

  Args:
    matrices: tree → whether each array is a stack of matrices, or else of vectors.

  Example:
    >>> rule = scale_by_adafactor(lambda tree: {"w": True})
    >>> params = {"w": jnp.ones((3, 2, 4))}
    >>> updates, _ = rule.update(params, rule.init(params))
    >>> float(updates["w"][0, 0, 0])
    1.0
  """

  def init(params: PyTree) -> AdafactorState:
    moments = jax.tree.map(_zeros, params, matrices(params))
    return AdafactorState(jnp.zeros((), jnp.int32), moments)

  def update(updates: PyTree, state: AdafactorState, params: PyTree | None = None):
    del params
    beta = 1 - (state.count + 1.0) ** -DECAY
    moments = jax.tree.map(lambda g, m: _moved(g, m, beta), updates, state.moments)
    updates = jax.tree.map(_scaled, updates, matrices(updates), moments)
    return updates, AdafactorState(state.count + 1, moments)

  return optax.GradientTransformation(init, update)


def _zeros(x: Array, matrix: bool) -> dict[str, Array]:
  if matrix and x.ndim >= 2 and min(x.shape[-2:]) >= FACTORED:
    return {"row": jnp.zeros_like(x[..., 0]), "column": jnp.zeros_like(x[..., 0, :])}
  return {"square": jnp.zeros_like(x)}


def _moved(gradient: Array, moments: dict[str, Array], beta: Array) -> dict[str, Array]:
  square = jnp.square(gradient) + EPSILON
  new = {
    "square": lambda: square,
    "row": lambda: square.mean(-1),
    "column": lambda: square.mean(-2),
  }
  move = lambda name, old: (beta * old + (1 - beta) * new[name]()).astype(old.dtype)
  return {name: move(name, old) for name, old in moments.items()}


def _scaled(gradient: Array, matrix: bool, moments: dict[str, Array]) -> Array:
  if "square" in moments:
    update = gradient * moments["square"] ** -0.5
  else:
    row = moments["row"] / moments["row"].mean(-1, keepdims=True)
    update = gradient * row[..., None] ** -0.5 * moments["column"][..., None, :] ** -0.5
  axes = (-2, -1)[not matrix :] if gradient.ndim >= 2 else None
  size = jnp.sqrt(jnp.square(update).mean(axes, keepdims=True))
  return update / jnp.maximum(1.0, size / THRESHOLD)
