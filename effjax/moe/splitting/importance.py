"""What each hidden unit matters to the loss: v = mean over tokens of |h ⊙ ∂L/∂h|.

LLaMA-MoE (Zhu et al., arXiv 2406.16554, section 3.1, equation 8): the change of the loss, to first
order, were the unit pruned. Of E groups of texts there are E such vectors, one for each expert.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from effjax.core import trees, weights
from effjax.core.numerics import zero_unless
from effjax.core.register import register
from effjax.core.trees import Chooser
from effjax.core.typing import Array, Float, Params, PyTree
from effjax.core.weights import Over, linear
from effjax.layers.objective import Batch, Objective

DOWN = r"ffn/down/kernel$"


@register(kind="wrapper")
class Probed(Over):
  """W, whose product x W has |x ⊙ ∂L/∂x|, summed over rows, as the gradient of the probe.

  Invariants:
    base: W, an array or `Weight` [..., D, F].
    probe: zeros, [..., D, 1].
  """

  probe: PyTree

  def materialize(self) -> Array:
    return weights.materialize(self.base)

  def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    return linear(_watched(x, self.probe), self.base)


def importance(
  objective: Objective, params: Params, batches: Iterable[Batch], *, select: Chooser = DOWN
) -> dict[str, Float[Array, "... F"]]:
  """Path of "down" → mean over tokens of |h ⊙ ∂L/∂h|, h the hidden units that go into it.

  Paths are those of `layers.capture`; in scanned segments there is a leading axis of layers. Where
  the objective is a mean over tokens, L is its sum over them. A token of weight 0 counts nothing.

  Args:
    objective: (params, batch, rng) → (loss, metrics), such as `train.next_token(module)`.
    params: the dense model's.
    batches: what it is measured on.
    select: pattern or predicate on paths, of the matrices that hidden units go into.

  Raises:
    ValueError: when nothing is selected, or there is no batch.

  Example:
    >>> def objective(params, batch, rng):
    ...   return (batch["hidden"] @ params["ffn"]["down"]["kernel"]).sum(), {}
    >>> params = {"ffn": {"down": {"kernel": jnp.array([[1.0], [-2.0]])}}}
    >>> importance(objective, params, [{"hidden": jnp.array([[3.0, 5.0]])}])
    {'ffn/down': Array([ 3., 10.], dtype=float32)}
  """
  objective = objective if isinstance(objective, Partial) else Partial(objective)
  found: dict[str, Any] = {}
  total = 0.0
  for batch in batches:
    new, weight = _measured(objective, params, dict(batch), select=select)
    found = jax.tree.map(jnp.add, found, new) if found else new
    total += float(weight)
  if not found:
    raise ValueError("importance: batches is empty; allowed: one or more of them")
  return {path.removesuffix("/kernel"): x / max(total, 1) for path, x in found.items()}


@functools.partial(jax.jit, static_argnames="select")
def _measured(objective: Partial, params: Params, batch: dict, *, select: Chooser):
  """Path of a kernel → Σ |h ⊙ ∂L/∂h|, and how much the loss of the batch is a mean over."""
  chosen = trees.matrices(params, select)

  def loss(probes: dict[str, Array]) -> tuple[Array, Array]:
    over = lambda path, leaf: Probed(leaf, probes[path])
    value, metrics = objective(trees.update(params, lambda p, _: p in chosen, over), batch, None)
    return value, jnp.float32(metrics.get("weight", 1.0))

  probes = {path: jnp.zeros((*w.shape[:-1], 1), jnp.float32) for path, w in chosen.items()}
  found, weight = jax.grad(loss, has_aux=True)(probes)
  return {path: x[..., 0] * weight for path, x in found.items()}, weight


@jax.custom_vjp
def _watched(x: Array, probe: Float[Array, "D 1"]) -> Array:
  """x; the cotangent of the probe is Σ |x ⊙ cotangent of x|."""
  return x


def _watched_forward(x, probe):
  return x, x


def _watched_backward(x, dx):
  both = zero_unless(dx != 0, x.astype(jnp.float32)) * dx.astype(jnp.float32)
  sums = jnp.abs(both).reshape(math.prod(x.shape[:-1]), x.shape[-1]).sum(axis=0)
  return dx, sums[:, None]


_watched.defvjp(_watched_forward, _watched_backward)
