"""Sums and means over the tokens that are there."""

import math

import jax.numpy as jnp

from effjax.core.numerics import zero_unless
from effjax.core.typing import Array, Bool, Float


def check_mask(mask: Array | None, values: Float[Array, "... E"]) -> None:
  """Raises ValueError where a mask is not one of the tokens of `values`."""
  if mask is not None and mask.shape != values.shape[:-1]:
    raise ValueError(f"mask: shape {mask.shape}; allowed: {values.shape[:-1]}, one of each token")


def token_sum(values: Float[Array, "... E"], mask: Bool[Array, "..."] | None) -> Float[Array, "E"]:
  """Σ over tokens of what each expert has, in float32; without what `mask` leaves out."""
  check_mask(mask, values)
  values = zero_unless(mask, values.astype(jnp.float32))
  return values.reshape(-1, values.shape[-1]).sum(axis=0)


def token_mean(values: Float[Array, "... E"], mask: Bool[Array, "..."] | None) -> Float[Array, "E"]:
  """The mean over tokens of what each expert has, in float32; 0 without tokens."""
  tokens = math.prod(values.shape[:-1]) if mask is None else mask.sum(dtype=jnp.float32)
  return token_sum(values, mask) / jnp.maximum(tokens, 1.0)
