"""What a layer may know about a batch besides its activations.

Every fact of a batch that some layer needs is a field of `Context`; models take each by keyword.
"""

import dataclasses

import jax.numpy as jnp
from flax import struct

from effjax.core.typing import Array, Float, Int


@struct.dataclass
class Context:
  """Facts about the batch; each layer reads what it needs, and every field may be None.

  With a cache a row is one sequence, and of `segment_ids` only the sign matters: a token with a
  negative one is not there. Caches do not write it, states do not absorb it, and what comes out in
  its place is finite and means nothing.

  Attributes:
    tokens: [B, T], the token ids (hash layers route by them).
    positions: [B, T], absolute positions; None means 0 … T−1.
    segment_ids: [B, T], equal ids attend to one another; negative is padding.
    memory: [B, S, D], what cross-attention reads.
    memory_segment_ids: [B, S], as `segment_ids`, for `memory`.
    global_positions: [B, G], tokens that see all and are seen by all; negative for none.
    attributes: [B, A], ids of what a whole row is (its language, its task), by which modular layers
      choose.
    previous: [B, T], the id before each token, −1 before the first; None means `tokens` shifted by
      one. Decoding has to give it, since the token before is not among `tokens`.
  """

  tokens: Int[Array, "B T"] | None = None
  positions: Int[Array, "B T"] | None = None
  segment_ids: Int[Array, "B T"] | None = None
  memory: Float[Array, "B S D"] | None = None
  memory_segment_ids: Int[Array, "B S"] | None = None
  global_positions: Int[Array, "B G"] | None = None
  attributes: Int[Array, "B A"] | None = None
  previous: Int[Array, "B T"] | None = None

  def check(self) -> None:
    """Raises ValueError where facts are not of one batch: [B, T] like `tokens`, or [B, …].

    Example:
      >>> Context(jnp.zeros((2, 3), int), positions=jnp.zeros((1, 3), int)).check()
      Traceback (most recent call last):
      ValueError: positions: shape (1, 3); allowed: (2, 3), that of tokens
    """
    if self.tokens is None:
      return
    given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    for name, x in given.items():
      axes = 2 if name in ("segment_ids", "positions", "previous") else 1
      if x is not None and tuple(x.shape[:axes]) != tuple(self.tokens.shape[:axes]):
        allowed = (
          f"{tuple(self.tokens.shape)}, that of tokens" if axes > 1 else "as many rows as tokens"
        )
        raise ValueError(f"{name}: shape {tuple(x.shape)}; allowed: {allowed}")

  def positions_for(self, x: Float[Array, "B T D"]) -> Int[Array, "B T"]:
    """`positions`, or 0 … T−1 in every row of `x`."""
    if self.positions is not None:
      return self.positions
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])

  def is_token(self, x: Float[Array, "B T D"]) -> Array | None:
    """Boolean [B, T], False at padding; None when nothing is padding."""
    return None if self.segment_ids is None else self.segment_ids >= 0

  def slots_for(self, x: Float[Array, "B T D"], length: int) -> Int[Array, "B T"]:
    """Where tokens go in a cache of `length` slots: to their positions; past its end if not there.

    Example:
      >>> context = Context(positions=jnp.array([[0, 0, 1]]), segment_ids=jnp.array([[-1, 0, 0]]))
      >>> context.slots_for(jnp.ones((1, 3, 2)), 8).tolist()
      [[8, 0, 1]]
    """
    positions, token = self.positions_for(x), self.is_token(x)
    return positions if token is None else jnp.where(token, positions, length)

  def previous_ids(self) -> Int[Array, "B T"]:
    """`previous`, or the tokens shifted by one within their segments, −1 before the first.

    Raises:
      ValueError: when neither it nor `tokens` is known.

    Example:
      >>> context = Context(jnp.array([[9, 5, 6, 7]]), segment_ids=jnp.array([[-1, 0, 0, 1]]))
      >>> context.previous_ids().tolist()
      [[-1, -1, 5, -1]]
    """
    if self.previous is not None:
      return self.previous
    if self.tokens is None:
      raise ValueError("Context: tokens=None and previous=None; allowed: one of them [B, T]")
    shift = lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    before, ids = shift(self.tokens), self.segment_ids
    return before if ids is None else jnp.where((ids >= 0) & (shift(ids) == ids), before, -1)

  def blanked(self) -> "Context":
    """The same with id 0 at position 0, and −1 before it, in place of what padding holds."""
    if self.segment_ids is None:
      return self
    token = self.segment_ids >= 0
    blank = lambda x, value: None if x is None else jnp.where(token, x, value)
    return dataclasses.replace(
      self,
      tokens=blank(self.tokens, 0),
      positions=blank(self.positions, 0),
      previous=blank(self.previous, -1),
    )
