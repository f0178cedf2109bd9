"""The hidden units of an MLP: what its transforms take them for, whatever its matrices are.

y = Σ_u act(x · up_u + b_u) down_u + b: an MLP is a sum over hidden units u, each with a column of
"up" (and of "gate") and a row of "down". So its parts are MLPs too. Which axis is that of the units
is said by the roles that the module states.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import trees
from effjax.core.known import known, number
from effjax.core.typing import Array, Int, Params, Size
from effjax.core.weights import pick
from effjax.layers import MLP, LayerSpec, TransformerConfig
from effjax.layers.stack import places
from effjax.moe.routers import TopK

HIDDEN = "hidden"


@dataclasses.dataclass(frozen=True)
class Site:
  """An MLP in a model.

  Attributes:
    index: which layer's.
    mlp: its module.
    params: its parameters.
    path: where those lie in the model's, such as "segments_0/layers_0/ffn".
    repeat: which repetition of a scanned segment it is; None where it is not scanned.
  """

  index: int
  mlp: MLP
  params: Params
  path: str
  repeat: int | None

  @classmethod
  def of(cls, config: TransformerConfig, index: int, spec: LayerSpec, tree: Params) -> "Site":
    """The ffn of a layer, as `layers.stack.change` gives it."""
    segment, name, repeat = places(config)[index]
    mlp: Any = spec.ffn
    return cls(index, mlp, tree["ffn"], f"{segment}/{name}/ffn", repeat)

  def statistic(self, name: str, found: Mapping[str, Any]) -> np.ndarray:
    """The values, of this layer, of what `layers.capture` found of what goes into "down".

    Args:
      name: what a message calls it.
      found: path → statistic, as `capture` gives it.

    Raises:
      ValueError: when there is nothing of this layer, or its values are traced.
    """
    path = f"{self.path}/down"
    if path not in found:
      given = trees.some(found) or "nothing"
      raise ValueError(f"{name} has {given}; allowed: {path!r} among them, for layer {self.index}")
    values = of_known(name, found[path])
    return values if self.repeat is None else values[self.repeat]


def of_known(name: str, x: Any) -> np.ndarray:
  """The values of an array.

  Raises:
    ValueError: where they are traced.
  """
  values = known(x)
  if values is None:
    raise ValueError(f"{name}: traced; allowed: arrays whose values are known, outside a program")
  return values


def chosen_ffns(
  of: str, config: TransformerConfig, layers: Sequence[int] | None, kind: type[nn.Module]
) -> dict[int, Any]:
  """Index → ffn of the layers that are to change, in their order.

  Args:
    of: whose a message says that `layers` are.
    layers: indices, negative ones from the end; None means every layer whose ffn is a `kind`.

  Raises:
    ValueError: when a layer does not exist or its ffn is not a `kind`, and for none.
  """
  ffns = [spec.ffn for spec in config.layers]
  count, found = len(ffns), {}
  if layers is None:
    layers = [index for index, ffn in enumerate(ffns) if isinstance(ffn, kind)]
  for index in layers:
    if not -count <= index < count:
      raise ValueError(f"{of}: layers has {index}; allowed: {-count} … {count - 1}")
    ffn, name = ffns[index], kind.__name__
    if not isinstance(ffn, kind):
      raise ValueError(f"{of}: the ffn of layer {index} is {type(ffn).__name__}; allowed: {name}")
    found[index % count] = ffn
  if not found:
    raise ValueError(f"{of}: no layer to change; allowed: layers whose ffn is an {kind.__name__}")
  return dict(sorted(found.items()))


def router_of(of: str, experts: Size, top_k: Size, **options: Any) -> TopK:
  """The router of a transform called `of`.

  Raises:
    ValueError: for numbers out of range.
  """
  experts = number("experts", experts, of=of, integer=True, least=1)
  return TopK(
    experts, number("top_k", top_k, of=of, integer=True, least=1, most=experts), **options
  )


def part(mlp: MLP, params: Params, units: Int[Array | np.ndarray, "n"]) -> dict:
  """The parameters of an MLP of the hidden units `units` alone, in the same representations.

  What has no axis of units, the bias of the outputs, is left as it is.

  Example:
    >>> params = {"up": {"kernel": jnp.eye(3)}, "down": {"kernel": jnp.eye(3)}}
    >>> part(MLP(3), params, np.array([2, 0]))["up"]["kernel"].shape
    (3, 2)
  """

  def of(path: str, leaf: Any, axis: int | None) -> Any:
    try:
      return leaf if axis is None else pick(leaf, units, axis)
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error

  return each(mlp, params, of)


def parts(mlp: MLP, params: Params, units: Int[Array | np.ndarray, "E n"]) -> dict:
  """The parts of each row of `units`, along a leading axis E.

  Example:
    >>> params = {"up": {"kernel": jnp.eye(3)}, "down": {"kernel": jnp.eye(3)}}
    >>> parts(MLP(3), params, np.array([[2, 0]]))["up"]["kernel"].shape
    (1, 3, 2)
  """
  return jax.vmap(lambda row: part(mlp, params, row))(jnp.asarray(units))


def each(mlp: MLP, params: Params, change: Callable[[str, Any, int | None], Any]) -> dict:
  """`params` with change(path, leaf, axis) in place of each leaf.

  The axis is that of the hidden units, counted from the end, or None.

  Raises:
    ValueError: for parameters that are not those of `mlp`.

  Example:
    >>> params = {"up": {"kernel": 1}, "down": {"kernel": 2}}
    >>> each(MLP(3), params, lambda path, leaf, axis: (leaf, axis))
    {'down': {'kernel': (2, -2)}, 'up': {'kernel': (1, -1)}}
  """
  roles, given = mlp.axes, trees.items(params)
  if roles.keys() != given.keys():
    raise ValueError(f"params has {', '.join(given)}; allowed: {', '.join(roles)}")
  place = lambda axes: axes.index(HIDDEN) - len(axes) if HIDDEN in axes else None
  return trees.update(params, "", lambda path, leaf: change(path, leaf, place(roles[path])))
