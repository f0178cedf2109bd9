"""What a layer may know about a batch besides its activations.

Every fact of a batch that some layer needs is a field of `Context`; models take each by keyword.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from effjax.core.numerics import zero_unless
from effjax.core.typing import Array, Bool, Float, Int, Shaped

Call = TypeVar("Call", bound=Callable[..., Any])


@struct.dataclass
class Context:
  """Facts about the batch; each layer reads what it needs, and every field may be None.

  With a cache a row is one sequence, and of `segment_ids` only the sign matters: a token with a
  negative one is not there. Caches do not write it, states do not absorb it, it takes no position,
  and what comes out in its place is zero.

  Attributes:
    tokens: [B, T], the token ids (hash layers route by them).
    positions: [B, T], absolute positions; None means 0 … T−1, and with a cache that the tokens
      which are there go on where the row's cache ends.
    segment_ids: [B, T], equal ids attend to one another; negative is padding.
    memory: [B, S, D], what cross-attention reads.
    memory_segment_ids: [B, S], as `segment_ids`, for `memory`.
    global_positions: [B, G], tokens that see all and are seen by all; negative for none.
    attributes: [B, A], ids of what a whole row is (its language, its task), by which modular layers
      choose.
    previous: [B, T], the id before each token, −1 before the first; None means `tokens` shifted by
      one. Decoding has to give it, since the token before is not among `tokens`.
    predicted: [B, T], the id that another model expects after each token, −1 for none; hash layers
      may route by it.
  """

  tokens: Int[Array, "B T"] | None = None
  positions: Int[Array, "B T"] | None = None
  segment_ids: Int[Array, "B T"] | None = None
  memory: Float[Array, "B S D"] | None = None
  memory_segment_ids: Int[Array, "B S"] | None = None
  global_positions: Int[Array, "B G"] | None = None
  attributes: Int[Array, "B A"] | None = None
  previous: Int[Array, "B T"] | None = None
  predicted: Int[Array, "B T"] | None = None

  def check(self) -> None:
    """Raises ValueError where facts are not of one batch: [B, T] like `tokens`, or [B, …]."""
    if self.tokens is None:
      return
    given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    for name, x in given.items():
      axes = 2 if name in ("segment_ids", "positions", "previous", "predicted") else 1
      if x is not None and tuple(x.shape[:axes]) != tuple(self.tokens.shape[:axes]):
        allowed = (
          f"{tuple(self.tokens.shape)}, that of tokens" if axes > 1 else "as many rows as tokens"
        )
        raise ValueError(f"{name}: shape {tuple(x.shape)}; allowed: {allowed}")

  def positions_for(self, x: Shaped[Array, "B T ..."]) -> Int[Array, "B T"]:
    """`positions`, or 0 … T−1 in every row of `x`."""
    if self.positions is not None:
      return self.positions
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])

  def is_token(self, x: Shaped[Array, "B T ..."]) -> Array | None:
    """Boolean [B, T], False at padding; None when nothing is padding."""
    return None if self.segment_ids is None else self.segment_ids >= 0

  def after(self, x: Shaped[Array, "B T ..."], ends: Int[Array, "B"]) -> "Context":
    """The same with positions: those given, or from `ends` on for the tokens of x that are there.

    Example:
      >>> context = Context(segment_ids=jnp.array([[0, 0, -1], [-1, 0, 0]]))
      >>> context.after(jnp.ones((2, 3, 4)), jnp.array([5, 0])).positions.tolist()
      [[5, 6, 0], [0, 0, 1]]
    """
    if self.positions is not None:
      return self
    token = self.is_token(x)
    there = jnp.ones(x.shape[:2], bool) if token is None else token
    places = ends[:, None] + jnp.cumsum(there, axis=1, dtype=ends.dtype) - 1
    return dataclasses.replace(self, positions=jnp.where(there, places, 0))

  def blank(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
    """`x` with zeros in place of what padding holds."""
    return zero_unless(self.is_token(x), x)

  def slots_for(self, x: Shaped[Array, "B T ..."], length: int) -> Int[Array, "B T"]:
    """Where tokens go in a cache of `length` slots: to their positions; past its end if not there.

    A token that has no place in the cache goes past its end too, see `lost`.

    Raises:
      ValueError: for a token that has none, where positions and segment ids are known.

    Example:
      >>> context = Context(positions=jnp.array([[0, 0, 1]]), segment_ids=jnp.array([[-1, 0, 0]]))
      >>> context.slots_for(jnp.ones((1, 3, 2)), 8).tolist()
      [[8, 0, 1]]
    """
    positions, token, lost = self.positions_for(x), self.is_token(x), self.lost(x, length)
    if not isinstance(lost, jax.core.Tracer) and lost.any():
      row, column = np.argwhere(np.asarray(lost))[0]
      raise ValueError(
        f"positions: {positions[row, column]} at [{row}, {column}]; allowed: 0 … {length - 1}, the "
        "slots of the cache"
      )
    placed = ~lost if token is None else token & ~lost
    return jnp.where(placed, positions, length)

  def lost(self, x: Shaped[Array, "B T ..."], length: int) -> Bool[Array, "B T"]:
    """The tokens that are there and have no place in a cache of `length` slots."""
    positions, token = self.positions_for(x), self.is_token(x)
    outside = (positions < 0) | (positions >= length)
    return outside if token is None else outside & token

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
    before, ids = shift(self.tokens.astype(jnp.int32)), self.segment_ids
    return before if ids is None else jnp.where((ids >= 0) & (shift(ids) == ids), before, -1)

  def blanked(self) -> "Context":
    """The same with id 0 at position 0, no id beside it, and zero memory in place of padding's."""
    ids, memory = self.segment_ids, self.memory
    blank = lambda x, value: x if ids is None or x is None else jnp.where(ids >= 0, x, value)
    if memory is not None and self.memory_segment_ids is not None:
      memory = zero_unless(self.memory_segment_ids >= 0, memory)
    return dataclasses.replace(
      self,
      tokens=blank(self.tokens, 0),
      positions=blank(self.positions, 0),
      memory=memory,
      previous=blank(self.previous, -1),
      predicted=blank(self.predicted, -1),
    )


def without_padding(call: Call) -> Call:
  """A module's call(x, context, …) with zeros at padding, in x and in what it gives.

  y = m ⊙ f(m ⊙ x), where m is 0 at padding and 1 elsewhere: neither what padding holds nor the
  cotangent that comes back to it has influence, NaN and inf included, on values, on what is sown
  and on gradients. Without segment ids it is `call`.

  Args:
    call: a mixer's or feed-forward layer's `__call__`, which gives y or (y, state).

  Example:
    >>> class Mean:
    ...   @without_padding
    ...   def __call__(self, x, context=Context()):
    ...     return jnp.broadcast_to(x.mean(1, keepdims=True), x.shape)
    >>> context = Context(segment_ids=jnp.array([[0, 0, -1, -1]]))
    >>> Mean()(jnp.array([[[2.0], [6.0], [jnp.nan], [jnp.inf]]]), context)[0, :, 0].tolist()
    [2.0, 2.0, 0.0, 0.0]
  """

  @functools.wraps(call)
  def masked(self, x, context=Context(), *rest, **named):
    y = call(self, context.blank(x), context.blanked(), *rest, **named)
    return (context.blank(y[0]), *y[1:]) if isinstance(y, tuple) else context.blank(y)

  return cast(Call, masked)
