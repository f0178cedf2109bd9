"""The position-wise feed-forward layer, plain and gated (GLU variants, arXiv 2002.05202)."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax

from effjax.core.typing import Array, Float
from effjax.layers.axes import linear_axes
from effjax.layers.context import Context, without_padding
from effjax.layers.linear import Linear
from effjax.layers.meshes import on_any_mesh

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "relu": jax.nn.relu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "silu": jax.nn.silu,
}


def activation(name: str) -> Callable[[Array], Array]:
  """The activation called `name`.

  Raises:
    ValueError: for an unknown name.
  """
  if name not in ACTIVATIONS:
    raise ValueError(f"activation {name!r} is unknown; allowed: {', '.join(ACTIVATIONS)}")
  return ACTIVATIONS[name]


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def hidden_units(name: str, up: Array, gate: Array | None = None) -> Array:
  """act(up), or act(gate) ⊙ up.

  The backward pass computes it again from `up` and `gate`, so that a layer keeps nothing between
  its matrix products: half of what a gated one would.
  """
  act = activation(name)
  return act(up) if gate is None else act(gate) * up


class MLP(nn.Module):
  """act(x W_up + b) W_down + b, or, gated, (act(x W_gate) ⊙ x W_up) W_down.

  GEGLU is `gated` with "gelu", SwiGLU with "silu". Parameters: "up", "gate" if gated, "down".

  Attributes:
    width: hidden width F.
    activation: "relu", "gelu" (exact), "gelu_tanh" or "silu".
    gated: whether a gate multiplies the hidden units.
    use_bias: whether the linear maps have biases.
  """

  width: int
  activation: str = "gelu"
  gated: bool = False
  use_bias: bool = False

  @on_any_mesh
  @nn.compact
  @without_padding
  def __call__(self, x: Float[Array, "B T D"], context: Context = Context()) -> Array:
    up = Linear(self.width, self.use_bias, name="up")(x)
    gate = Linear(self.width, self.use_bias, name="gate")(x) if self.gated else None
    hidden = hidden_units(self.activation, up, gate)
    return Linear(x.shape[-1], self.use_bias, name="down")(hidden)

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    found = linear_axes("down", "hidden", "embed", self.use_bias)
    for name in ("up", "gate") if self.gated else ("up",):
      found |= linear_axes(name, "embed", "hidden", self.use_bias)
    return found

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward; `length` and `queries` have no influence."""
    return 2.0 * width * self.width * (3 if self.gated else 2)
