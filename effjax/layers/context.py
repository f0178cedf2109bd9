"""What a layer may know about a batch besides its activations."""

import jax.numpy as jnp
from flax import struct

from effjax.core.typing import Array, Float, Int


@struct.dataclass
class Context:
  """Facts about the batch; each layer reads what it needs, and every field may be None.

  Attributes:
    tokens: [B, T], the token ids (hash layers route by them).
    positions: [B, T], absolute positions; None means 0 … T−1.
    segment_ids: [B, T], equal ids attend to one another; negative is padding.
    memory: [B, S, D], what cross-attention reads.
    memory_segment_ids: [B, S], as `segment_ids`, for `memory`.
    global_positions: [B, G], tokens that see all and are seen by all; negative for none.
  """

  tokens: Int[Array, "B T"] | None = None
  positions: Int[Array, "B T"] | None = None
  segment_ids: Int[Array, "B T"] | None = None
  memory: Float[Array, "B S D"] | None = None
  memory_segment_ids: Int[Array, "B S"] | None = None
  global_positions: Int[Array, "B G"] | None = None

  def positions_for(self, x: Float[Array, "B T D"]) -> Int[Array, "B T"]:
    """`positions`, or 0 … T−1 in every row of `x`."""
    if self.positions is not None:
      return self.positions
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])

  def is_token(self, x: Float[Array, "B T D"]) -> Array | None:
    """Boolean [B, T], False at padding; None when nothing is padding."""
    return None if self.segment_ids is None else self.segment_ids >= 0
