"""Layers in segments, so that compile time does not grow with depth.

Neighbouring layers that repeat a pattern form a `Segment`; one that repeats is scanned, its
parameters stacked on a leading axis R. A transform wants plain layers: `split` gives one tree per
layer, `join` puts such a list back, stacked as its configuration wants it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.typing import Params, PyTree
from effjax.layers.spec import LayerSpec, TransformerConfig


@dataclasses.dataclass(frozen=True)
class Segment:
  """`pattern`, a tuple of layers, `repeats` times over."""

  pattern: tuple[LayerSpec, ...]
  repeats: int

  def __len__(self) -> int:
    return len(self.pattern) * self.repeats


def segments(config: TransformerConfig) -> tuple[Segment, ...]:
  """The layers of `config` grouped into repeating patterns, in order.

  From each place, the pattern whose repetitions reach furthest is taken, the shortest such.
  """
  layers = config.layers
  if not config.scan:
    return tuple(Segment((layer,), 1) for layer in layers)
  out, start = [], 0
  while start < len(layers):
    best = _longest_repeat(layers[start:])
    out.append(best)
    start += len(best)
  return tuple(out)


def _longest_repeat(layers: tuple[LayerSpec, ...]) -> Segment:
  best = Segment(layers[:1], 1)
  for period in range(1, len(layers) // 2 + 1):
    repeats = 1
    while layers[repeats * period : (repeats + 1) * period] == layers[:period]:
      repeats += 1
    if repeats > 1 and repeats * period > len(best):
      best = Segment(layers[:period], repeats)
  return best


def places(config: TransformerConfig) -> list[tuple[str, str, int | None]]:
  """For each layer, where its parameters lie: segment, name in it, and index in the stack."""
  out = []
  for number, segment in enumerate(segments(config)):
    for repeat in range(segment.repeats):
      index = repeat if segment.repeats > 1 else None
      names = [f"layers_{i}" for i in range(len(segment.pattern))]
      out += [(f"segments_{number}", name, index) for name in names]
  return out


def split(config: TransformerConfig, params: Params) -> tuple[list[PyTree], dict]:
  """One parameter tree per layer, and what does not belong to a layer."""
  layers = []
  for segment, name, index in places(config):
    tree = params[segment][name]
    layers.append(tree if index is None else jax.tree.map(lambda x, i=index: x[i], tree))
  rest = {name: tree for name, tree in params.items() if not name.startswith("segments_")}
  return layers, rest


def join(config: TransformerConfig, layers: list[PyTree], rest: Params) -> dict:
  """The inverse of `split` for a configuration, which need not be the one that was split.

  Raises:
    ValueError: when `layers` has another length than `config.layers`.
  """
  if len(layers) != len(config.layers):
    raise ValueError(f"join: {len(layers)} layer trees; allowed: {len(config.layers)}")
  stacks: dict[tuple[str, str], list[PyTree]] = {}
  for (segment, name, _), tree in zip(places(config), layers, strict=True):
    stacks.setdefault((segment, name), []).append(tree)
  params = dict(rest)
  for (segment, name), trees in stacks.items():
    stacked = trees[0] if len(trees) == 1 else jax.tree.map(_stack, *trees)
    params.setdefault(segment, {})[name] = stacked
  return params


def unscan(config: TransformerConfig, params: Params) -> tuple[TransformerConfig, dict]:
  """The same model with every layer on its own: slower to compile, no slicing when it runs."""
  flat = dataclasses.replace(config, scan=False)
  return flat, join(flat, *split(config, params))


def _stack(*leaves):
  return np.stack(leaves) if isinstance(leaves[0], np.ndarray) else jnp.stack(leaves)
