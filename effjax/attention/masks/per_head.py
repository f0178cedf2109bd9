"""A mask for each head."""

import dataclasses
import functools
import operator

import jax
import numpy as np

from effjax.attention.masks.base import Mask
from effjax.kernels.flash_attention.tile_map.spans import stack


@functools.partial(jax.tree_util.register_dataclass, data_fields=["masks"], meta_fields=["index"])
@dataclasses.dataclass(frozen=True)
class PerHead(Mask):
  """Head n sees what `masks[index[n]]` shows.

  Example:
    >>> from effjax.attention.masks import Causal, SlidingWindow
    >>> mask = PerHead((SlidingWindow(1, 0), Causal()), (0, 0, 1))
    >>> mask.dense(8).shape, mask.mean_keys(2)
    ((1, 3, 8, 8), 1.5)
  """

  masks: tuple[Mask, ...]
  index: tuple[int, ...]

  def __post_init__(self):
    if not self.index or not all(0 <= i < len(self.masks) for i in self.index):
      raise ValueError(f"PerHead: index={self.index}; allowed: of 0 … {len(self.masks) - 1}")

  @property
  def heads(self) -> int:
    return len(self.index)

  @property
  def causal(self) -> bool:
    return all(self.masks[i].causal for i in self.index)

  @property
  def exact(self) -> bool:
    return all(mask.exact for mask in self.masks)

  @property
  def relative(self) -> bool:
    return all(mask.relative for mask in self.masks)

  def features(self, q_positions, length):
    q, k = zip(*(mask.features(q_positions, length) for mask in self.masks), strict=True)
    return (np.array(self.index, np.int32)[None, :, None], q), k

  def predicate(self, q, k, q_features, k_features):
    which, q_features = q_features
    parts = zip(self.masks, q_features, k_features, strict=True)
    return functools.reduce(
      operator.or_,
      ((which == i) & mask.predicate(q, k, *part) for i, (mask, *part) in enumerate(parts)),
    )

  def spans(self, grid, q_features, k_features):
    parts = zip(self.masks, q_features[1], k_features, strict=True)
    found = [mask.spans(grid, *part) for mask, *part in parts]
    return tuple(stack(spans, self.index) for spans in zip(*found, strict=True))

  def check(self, *sizes):
    for mask in self.masks:
      mask.check(*sizes)
