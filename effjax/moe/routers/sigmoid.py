"""Sigmoid gates, and a bias on the choice that keeps the load even without a loss.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2); loss-free balancing, Wang et al., arXiv 2408.15664.
"""

import dataclasses
import functools
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax.core import spmd, trees
from effjax.core.known import number
from effjax.core.numerics import expand
from effjax.core.typing import Array, Float, Number, Scalar, Size
from effjax.core.weights import materialize
from effjax.layers import Routing, weight
from effjax.moe.routers.groups import GroupLimit
from effjax.moe.routers.top_k import TopK

State = TypeVar("State", bound=Any)


def sigmoid_routing(
  logits: Float[Array, "... E"],
  bias: Float[Array, "..."] | None = None,
  *,
  k: Size,
  renormalize: bool = True,
  limit: GroupLimit | None = None,
) -> Routing:
  """Each token to the k experts of the largest s + b, with gates s = sigmoid(logits).

  The bias b has a say in the choice alone, and gets no gradient. Of equal s + b the larger logit
  wins, since s is 1 for large ones, then the lower expert. The decision's `probs` are s over its
  sum over all experts.

  Args:
    logits: the router's output.
    bias: b; None is 0.
    k: experts a token visits, 1 … E.
    renormalize: whether a token's gates are divided by their sum.
    limit: groups of experts, of which a token may choose from a few; a group counts by the sum of
      its best s + b.

  Raises:
    ValueError: when k is out of range, or more than the groups hold; for a bias of another shape.

  Example:
    >>> logits = jnp.log(jnp.array([[1.0, 3.0, 4.0]]))  # s = 1 / 2, 3 / 4, 4 / 5
    >>> routing = sigmoid_routing(logits, jnp.array([0.5, 0.0, 0.0]), k=2)
    >>> routing.experts.tolist(), routing.gates.round(3).tolist()
    ([[0, 2]], [[0.385..., 0.615...]])
  """
  count = logits.shape[-1]
  k = number("k", k, of="sigmoid_routing", integer=True, least=1, most=count)
  if bias is not None and bias.shape != (count,):
    raise ValueError(f"sigmoid_routing: bias {bias.shape}; allowed: ({count},), one of each expert")
  logits = logits.astype(jnp.float32)
  chosen_by = jax.nn.sigmoid(logits)
  if bias is not None:
    chosen_by = chosen_by + expand(bias.astype(jnp.float32), logits.ndim)
  if limit is not None:
    chosen_by = limit.within(chosen_by, k)
  experts = _largest(jax.lax.stop_gradient(chosen_by), jax.lax.stop_gradient(logits), k)
  size = jax.nn.log_sigmoid(logits)
  chosen = jnp.take_along_axis(size, experts, axis=-1)
  gates = jax.nn.softmax(chosen) if renormalize else jnp.exp(chosen)
  return Routing(experts, gates, jax.nn.softmax(size), logits)


@spmd.on_any_mesh
def _largest(first: Array, second: Array, k: int) -> Array:
  """Places of the k largest by the first, then by the second, then by place."""
  places = jax.lax.broadcasted_iota(jnp.int32, first.shape, first.ndim - 1)
  *_, order = jax.lax.sort((-first, -second, places), num_keys=2, is_stable=True)
  return order[..., :k]


class SigmoidTopK(TopK):
  """A router: each token to k experts, by `sigmoid_routing`.

  Parameters, losses and metrics are those of `Scored`, with shares s / Σ s in place of the softmax,
  and "bias" [E], which starts at zero and which no gradient moves: `move_bias` does.

  Attributes:
    top_k, renormalize, scale, limit: as in `TopK`; the scale is 2.5 in DeepSeek-V3.
  """

  _: dataclasses.KW_ONLY
  load_balance: Number = 0.0
  z: Number = 0.0

  def _choose(self, rows, logits, mask, key) -> Routing:
    bias = materialize(weight(self, "bias", nn.initializers.zeros, (self.experts,)))
    choose = functools.partial(
      sigmoid_routing, k=self.top_k, renormalize=bool(self.renormalize), limit=self.limit
    )
    return spmd.map_rows(choose, logits, jax.lax.stop_gradient(bias))

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    return super().axes | {"bias": ("experts",)}


def move_bias(state: State, metrics: dict[str, Array], *, speed: Scalar = 1e-3) -> State:
  """b ← b + u · sign(mean f − f) in every router with a bias, as `after` of `make_train_step`.

  f are the shares of choices that the step's batch made, on all devices and in all microbatches, as
  routers sow them. A step whose loss is not finite moves nothing.

  Args:
    state: what has `params`.
    metrics: what the step's objective gives, with "…/load" for each router.
    speed: u, from 0.

  Raises:
    ValueError: for a speed below 0, and where no router has both.

  Example:
    >>> from effjax.train.state import TrainState
    >>> state = TrainState(0, {"router": {"bias": jnp.zeros(3)}}, None)
    >>> moved = move_bias(state, {"router/load": jnp.array([0.5, 0.3, 0.2])})
    >>> moved.params["router"]["bias"].tolist()
    [-0.001..., 0.001..., 0.001...]
  """
  speed = number("speed", speed, of="move_bias", least=0)
  moved = 0

  def move(path: str, leaf: Any) -> Any:
    nonlocal moved
    router, _, name = path.rpartition("/")
    load = metrics.get(f"{router}/load") if name == "bias" else None
    if load is None:
      return leaf
    moved += 1
    step = speed * jnp.sign(load.mean(axis=-1, keepdims=True) - load)
    step = jnp.where(metrics.get("finite", True), step, 0)
    return jax.tree.map(lambda b: (b + step).astype(b.dtype), leaf)

  params = trees.update(state.params, "", move)
  if not moved:
    raise ValueError("move_bias: no router has a bias and sows its load; allowed: SigmoidTopK")
  return dataclasses.replace(state, params=params)
