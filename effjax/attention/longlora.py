"""Shifted sparse attention, S²-Attn (LongLoRA, arXiv 2309.12307, section 3.2)."""

import functools
import math

import jax.numpy as jnp
import numpy as np

from effjax.attention import masks, parts
from effjax.attention.attend import attend
from effjax.attention.multi_head import Attention
from effjax.core.typing import Array, Float, Int


def shifted_group_attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K Hv"],
  *,
  group: int,
  causal: bool = True,
  segment_ids: Int[Array, "#B T"] | None = None,
  scale: float | None = None,
  logit_softcap: float | None = None,
  sinks: Float[Array, "N"] | None = None,
  return_lse: bool = False,
  implementation: str | None = None,
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
  """Attention within groups of G tokens; for half the heads they begin half a group later.

  The last N / 2 heads are rolled by −⌊G/2⌋, all heads attend in groups, and the roll is undone:
  groups of the one half join neighbours of the other. Rolling puts the last tokens and the first
  into one group, where they do not see each other, unlike in the paper. Up to G tokens are one
  group, and not rolled: full attention. The cost is that of T · G scores a head.

  Args:
    query: [B, T, N, H], N even. T need not be a multiple of G.
    key, value: [B, T, K, H]; query head n uses key-value head n // (N / K).
    group: G.
    causal: whether a token sees the ones before it and itself only.
    segment_ids: [B, T], as in `attend`, below 2³⁰: they cut besides the groups.
    scale, logit_softcap, sinks, return_lse, implementation: as in `attend`.

  Raises:
    ValueError: for a group below 2, an odd number of heads, or what `attend` refuses.

  Example:
    >>> x = jnp.ones((2, 7, 4, 8))
    >>> shifted_group_attention(x, x, x, group=4).shape
    (2, 7, 4, 8)
  """
  B, T, N, _ = query.shape
  _check(group, N)
  group, shift = _cut(T, group)
  if key.shape[2] % 2:
    key, value = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (key, value))
  folded = attend(
    *(_fold(x, group, shift) for x in (query, key, value)),
    mask=masks.Causal() if causal else masks.Full(),
    segment_ids=_group_ids(segment_ids, B, T, group, shift),
    scale=scale,
    logit_softcap=logit_softcap,
    return_lse=True,
    implementation=implementation,
  )
  y, lse = (x.reshape(B, 2, -1, *x.shape[2:]) for x in folded)
  if sinks is not None:
    y, lse = parts.add_sinks((y, lse), sinks.reshape(1, 2, 1, -1))
  y, lse = (_unrolled(x, shift)[:, :T] for x in (y, lse))
  return (y, lse) if return_lse else y


def _unrolled(x: Array, shift: int) -> Array:
  """[B, 2, T, N / 2, ...] of both halves of the heads as [B, T, N, ...]."""
  return jnp.concatenate([x[:, 0], jnp.roll(x[:, 1], shift, axis=1)], axis=2)


def mean_keys(length: int, group: int, causal: bool) -> float:
  """Number of keys a query sees, on average over queries and heads.

  Example:
    >>> mean_keys(8, 4, True), mean_keys(8, 8, True)
    (2.25, 4.5)
  """
  group, shift = _cut(length, group)
  total = 0.0
  for start in (0, shift):
    sizes = np.diff(np.unique([0, *range(start, length, group), length]))
    total += (sizes * (sizes + 1) / 2 if causal else sizes**2).sum()
  return float(total / 2 / length)


def _cut(length: int, group: int) -> tuple[int, int]:
  """Tokens in a group, and by how many half of the heads are shifted."""
  return (group, group // 2) if length > group else (length, 0)


def _pairs(first: Array, second: Array, group: int, shift: int) -> Array:
  """Both [B, T, ...], T a multiple of the group, as [B · 2 · T / group, group, ...]."""
  x = jnp.stack([first, jnp.roll(second, -shift, axis=1)], axis=1)
  return x.reshape(-1, group, *x.shape[3:])


def _fold(x: Array, group: int, shift: int) -> Array:
  """[B, T, N, H] as groups of half the heads, [B · 2 · groups, group, N / 2, H]."""
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % group), (0, 0), (0, 0)))
  first, second = jnp.split(x, 2, axis=2)
  return _pairs(first, second, group, shift)


def _group_ids(segment_ids, B: int, T: int, group: int, shift: int) -> Array:
  """Segment ids within the groups; after rolling, the first tokens have ids of their own."""
  ids = jnp.zeros((1, T), jnp.int32) if segment_ids is None else segment_ids
  ids = jnp.pad(ids, ((0, 0), (0, -T % group)), constant_values=-1)
  wrapped = (jnp.arange(ids.shape[1]) < shift).astype(ids.dtype)[None]
  apart = jnp.where(ids < 0, -1, 2 * ids + wrapped)
  ids, apart = (jnp.broadcast_to(x, (B, x.shape[1])) for x in (ids, apart))
  return _pairs(ids, apart, group, shift)


def _check(group: int, heads: int) -> None:
  if group < 2:
    raise ValueError(f"shifted_group_attention: group={group}; allowed: from 2")
  if heads % 2:
    raise ValueError(f"shifted_group_attention: {heads} query heads; allowed: even numbers")


class ShiftedSparseAttention(Attention):
  """`Attention` by `shifted_group_attention` in training, and in full when decoding with a cache.

  That is LongLoRA's use of it: parameters are those of `Attention`, taken from a pretrained model,
  and the mask of the cached form is the pretrained one.

  Attributes:
    group: G, or None for T / 4, rounded up.
    mask: `Causal()` or `Full()`.
  """

  group: int | None = None

  def _attend(self, x, query, key, value, positions, context, cache):
    self._check()
    if cache is not None:
      return super()._attend(x, query, key, value, positions, context, cache)
    arguments = self._arguments
    del arguments["scores"]
    tokens = functools.partial(
      shifted_group_attention,
      query,
      key,
      value,
      group=self._group(query.shape[1]),
      causal=self.mask == masks.Causal(),
      segment_ids=context.segment_ids,
      **arguments,
    )
    return self._with_prefix(tokens, query, positions, context), None

  def _mean_keys(self, length, queries):
    if queries not in (None, length):  # the others are in a cache, where attention is in full
      return super()._mean_keys(length, queries)
    return mean_keys(length, self._group(length), self.mask == masks.Causal())

  def _group(self, length: int) -> int:
    return max(2, math.ceil(length / 4)) if self.group is None else self.group

  def _check(self) -> None:
    plain = self.mask in (masks.Causal(), masks.Full())
    if not plain or self.cross or self.scores is not None:
      given = f"mask={self.mask}, cross={self.cross}, scores={self.scores}"
      raise ValueError(
        f"ShiftedSparseAttention: {given}; allowed: Causal() or Full(), and cross=False and "
        "scores=None"
      )
