"""Token embeddings and absolute positions."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from effjax.core.known import number
from effjax.core.typing import Array, Float, Int, Integer, Params, Size
from effjax.core.weights import entries, linear, take, transpose
from effjax.layers.linear import weight
from effjax.layers.meshes import on_any_mesh


class Embed(nn.Module):
  """A table [entries, features] under "embedding": rows by index, and logits when tied."""

  entries: int
  features: int
  stddev: float = 0.02

  def setup(self):
    init = nn.initializers.normal(self.stddev)
    self.table = weight(self, "embedding", init, (self.entries, self.features))

  @on_any_mesh
  def __call__(
    self, indices: Integer[Array | np.ndarray, "B T"], dtype=jnp.float32
  ) -> Float[Array, "B T D"]:
    """The rows; NaN for a traced index that is none.

    Raises:
      ValueError: for indices, where they are known, that are none of 0 … entries − 1.
    """
    return take(self.table, indices, self.name or "indices").astype(dtype)

  def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """x · tableᵀ: the output layer that shares the input embeddings."""
    return linear(x, transpose(self.table))

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    return {"embedding": ("vocab", "embed")}


def known_ids(vocab_size: int, params: Params) -> int:
  """How many ids a model's table of embeddings knows, virtual tokens included."""
  table = params.get("embed", {}).get("embedding")
  return vocab_size if table is None else entries(table)


def sinusoidal_positions(positions: Int[Array, "B T"], width: Size) -> Float[Array, "B T D"]:
  """[sin(p·w_i) … cos(p·w_i) …], w_i = 10000^(−i/(D/2−1)) (Vaswani et al., arXiv 1706.03762).

  Sines fill the first half and cosines the second, as tensor2tensor and fairseq lay them out.

  Raises:
    ValueError: for a width that is odd or below 4.
  """
  if number("width", width, integer=True) % 2 or width < 4:
    raise ValueError(f"sinusoidal_positions: width {width}; allowed: even widths from 4")
  half = width // 2
  frequency = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / (half - 1))
  angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
