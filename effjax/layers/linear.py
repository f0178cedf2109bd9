"""Linear maps whose matrix may be any weight representation."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from effjax.core.typing import Array, Float
from effjax.core.weights import linear

KERNEL_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=-2)


def weight(module: nn.Module, name: str, init, shape: tuple[int, ...]):
  """The parameter `name` of `module`: an array, or the `Weight` that stands in its place.

  `Module.param` accepts arrays of one shape only; this creates the parameter with it at
  initialisation, and otherwise fetches whatever is there.

  Raises:
    ValueError: when the stored parameter has another logical shape.
  """
  if not module.has_variable("params", name):
    return module.param(name, init, shape, jnp.float32)
  value: Any = module.get_variable("params", name)
  if tuple(value.shape) != tuple(shape):
    path = "/".join((*module.path, name))
    raise ValueError(f"parameter {path!r} has shape {tuple(value.shape)}; allowed: {tuple(shape)}")
  return value


class Linear(nn.Module):
  """y = x W + b with W [D, features] under "kernel" and b [features] under "bias"."""

  features: int
  use_bias: bool = False
  kernel_init: nn.initializers.Initializer = KERNEL_INIT

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    kernel = weight(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
    bias = weight(self, "bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
    return linear(x, kernel, bias)
