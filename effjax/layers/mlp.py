"""The position-wise feed-forward layer, plain and gated (GLU variants, arXiv 2002.05202)."""

from collections.abc import Callable

import flax.linen as nn
import jax

from effjax.core.typing import Array, Float
from effjax.layers.context import Context
from effjax.layers.linear import Linear

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

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], context: Context = Context()) -> Array:
    act = activation(self.activation)
    up = Linear(self.width, self.use_bias, name="up")(x)
    if self.gated:
      hidden = act(Linear(self.width, self.use_bias, name="gate")(x)) * up
    else:
      hidden = act(up)
    return Linear(x.shape[-1], self.use_bias, name="down")(hidden)

  def flops(self, width: int, length: int) -> float:
    """Matrix-product FLOPs a token, forward; `length` has no influence."""
    return 2.0 * width * self.width * (3 if self.gated else 2)
