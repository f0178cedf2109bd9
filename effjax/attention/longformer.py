"""Longformer: a window, and global tokens with projections of their own (arXiv 2004.05150)."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from effjax.attention import masks
from effjax.attention.attend import attend
from effjax.attention.multi_head import Attention
from effjax.core.typing import Array, Int, Params
from effjax.layers import TransformerConfig, stack, taps

_NAMES = ("query", "key", "value")


class Longformer(Attention):
  """Attention through a local mask, and of a few global tokens to and from all.

  A token attends to its window and to the global tokens under one softmax; a global token attends
  to all, with queries, keys and values from projections of their own. Parameters: those of
  `Attention`, and "query_global", "key_global" and "value_global" of the same shapes.

  Attributes:
    mask: what tokens see beside the global ones: `SlidingWindow(w, w)`, dilated, one for each head.
    positions: the global tokens: the first n, or a tuple of positions; None takes
      `context.global_positions`.
    causal: nothing sees what comes after it, global tokens included.

  Reference: Longformer, section 3.1. The cost is N (2w + 1 + 2G) scores a head.
  """

  takes_prefix = False

  mask: masks.Mask = masks.SlidingWindow(256, 256)
  positions: int | tuple[int, ...] | None = None
  causal: bool = False

  @property
  def reads(self) -> tuple[str, ...]:
    return super().reads + (("global_positions",) if self.positions is None else ())

  def _mask(self, context, length):
    seen = self.mask | masks.Global(self._positions(context))
    return seen & masks.Causal() if self.causal else seen

  def _attend(self, x, query, key, value, positions, context, cache):
    if cache is not None or self.cross or self.qk_norm is not None:
      given = f"cross={self.cross}, qk_norm={self.qk_norm}, cache={type(cache).__name__}"
      raise ValueError(f"Longformer: {given}; allowed: False, None and no cache")
    local, _ = super()._attend(x, query, key, value, positions, context, cache)
    at = _listed(self._positions(context), x.shape[0])
    if at.shape[1] == 0:
      return local, None
    rows = jnp.arange(x.shape[0])[:, None]
    chosen = jnp.maximum(at, 0)
    heads, width = query.shape[2:]
    ids = context.segment_ids
    with taps.tokens(jnp.where(at < 0, -1, 0 if ids is None else ids[rows, chosen])):
      query = self._project("query_global", x[rows, chosen], heads, width)
      query = self._placed("query_global", query, positions[rows, chosen])
    key, value = (
      self._project(f"{name}_global", x, key.shape[2], width) for name in ("key", "value")
    )
    key = self._placed("key_global", key, positions)
    out = attend(
      query,
      key,
      value,
      mask=masks.Causal() if self.causal else None,
      segment_ids=None if ids is None else (ids[rows, chosen], ids),
      query_positions=chosen,
      **self._arguments,
    )
    # A negative position is none: it is moved past the end, where nothing is written.
    return local.at[rows, jnp.where(at < 0, x.shape[1], at)].set(out, mode="drop"), None

  def _positions(self, context):
    given = context.global_positions if self.positions is None else self.positions
    if given is None:
      raise ValueError("Longformer: positions=None needs context.global_positions [B, G]")
    return given

  def init_cache(self, width, batch, length, dtype=jnp.float32):
    """There is none: raises ValueError."""
    raise ValueError("Longformer: a cache; allowed: none, since global tokens see what comes later")

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """Those of `Attention`, and again those of its projections if there are global tokens."""
    found = super().axes
    if self.positions in (0, ()):
      return found
    again = {p.replace("/", "_global/"): r for p, r in found.items() if p.split("/")[0] in _NAMES}
    return found | again

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """As in `Attention`, without global tokens that only the context knows."""
    more = 4.0 * width * self._head_width(width) * self._kv_heads()
    return super().flops(width, length, queries) + more

  def _mean_keys(self, length, queries):
    seen = self.mask if self.positions is None else self.mask | masks.Global(self.positions)
    seen = seen & masks.Causal() if self.causal else seen
    return seen.mean_keys(length, queries)


def _listed(positions, batch: int) -> Int[Array, "B G"]:
  """Global positions as an array."""
  if isinstance(positions, int):
    positions = tuple(range(positions))
  if isinstance(positions, tuple):
    positions = jnp.array([positions], jnp.int32)
  return jnp.broadcast_to(positions, (batch, positions.shape[1]))


def from_attention(params: Params) -> dict:
  """Parameters of a `Longformer` from those of an `Attention`: its projections, twice.

  Reference: Longformer, section 5, where pretraining goes on from RoBERTa.
  """
  return {**params, **{f"{name}_global": params[name] for name in _NAMES}}


def convert(
  config: TransformerConfig,
  params: Params,
  *,
  window: int,
  context: int | None = None,
  positions: int | tuple[int, ...] | None = 1,
  layers: Sequence[int] | None = None,
) -> tuple[TransformerConfig, dict]:
  """A pretrained model with Longformer attention, and learned positions for longer sequences.

  Args:
    window: keys on each side of a token.
    context: the longest sequence; learned positions are repeated up to it. None leaves it.
    positions: as in `Longformer`.
    layers: indices of the layers to change; None means all.

  Raises:
    ValueError: when a layer does not exist or its mixer is not an `Attention`.

  Reference: Longformer, section 5.
  """
  count, longer = len(config.layers), config.context if context is None else context
  chosen = range(count) if layers is None else layers
  for index in chosen:
    if not -count <= index < count:
      raise ValueError(f"longformer.convert: layers has {index}; allowed: {-count} … {count - 1}")

  def change(index, spec, tree):
    if index not in chosen and index - count not in chosen:
      return spec, tree
    if type(spec.mixer) is not Attention or spec.mixer.mask not in (masks.Full(), masks.Causal()):
      raise ValueError(
        f"longformer.convert: the mixer of layer {index} is {spec.mixer}; allowed: Attention, "
        "full or causal"
      )
    spec = dataclasses.replace(spec, mixer=_longformer(spec.mixer, window, positions))
    return spec, {**tree, "mixer": from_attention(tree["mixer"])}

  changed, new = stack.change(config, params, change)
  if config.positions == "learned":
    new["positions"] = _repeated(new["positions"], config, longer)
  return dataclasses.replace(changed, context=longer, family=None), new


def _longformer(mixer: Attention, window: int, positions) -> Longformer:
  fields = {field.name for field in dataclasses.fields(Attention)} - {"parent", "name", "mask"}
  return Longformer(
    **{name: getattr(mixer, name) for name in fields},
    mask=masks.SlidingWindow(window, window),
    positions=positions,
    causal=mixer.mask == masks.Causal(),
  )


def _repeated(table: Params, config: TransformerConfig, context: int) -> dict:
  """The learned positions again and again, after the rows that stand before position 0."""

  def extend(x):
    first, rows = x[: config.position_offset], x[config.position_offset :]
    return jnp.concatenate([first, jnp.resize(rows, (context, *rows.shape[1:]))])

  return jax.tree.map(extend, table)
