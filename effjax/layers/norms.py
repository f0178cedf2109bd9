"""Layer normalisation (arXiv 1607.06450) and RMS normalisation (arXiv 1910.07467)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax.core.typing import Array, Float
from effjax.core.weights import Weight, along
from effjax.layers.linear import weight


def rms_norm(
  x: Float[Array, "... D"], scale: Float[Array, "D"] | Weight, eps: float = 1e-6
) -> Array:
  """scale · x / √(mean x² + eps), computed in float32, returned in the type of `x`."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * along(scale, y).astype(jnp.float32)).astype(x.dtype)


def layer_norm(
  x: Float[Array, "... D"],
  scale: Float[Array, "D"] | Weight,
  bias: Float[Array, "D"] | Weight,
  eps: float = 1e-5,
) -> Array:
  """scale · (x − mean) / √(var + eps) + bias, computed in float32."""
  y = x.astype(jnp.float32)
  y = y - y.mean(axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  y = y * along(scale, y).astype(jnp.float32) + along(bias, y).astype(jnp.float32)
  return y.astype(x.dtype)


class RMSNorm(nn.Module):
  """`rms_norm` over the last axis with a learned scale."""

  eps: float = 1e-6

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return rms_norm(x, weight(self, "scale", nn.initializers.ones, (x.shape[-1],)), self.eps)

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    return {"scale": ("embed",)}


class LayerNorm(nn.Module):
  """`layer_norm` over the last axis with a learned scale and bias."""

  eps: float = 1e-5

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    scale = weight(self, "scale", nn.initializers.ones, (x.shape[-1],))
    bias = weight(self, "bias", nn.initializers.zeros, (x.shape[-1],))
    return layer_norm(x, scale, bias, self.eps)

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    return {"scale": ("embed",), "bias": ("embed",)}
