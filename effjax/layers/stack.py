"""Layers in segments, so that compile time does not grow with depth.

Neighbouring layers that repeat a pattern form a `Segment`; one that repeats is scanned, its
parameters stacked on a leading axis R. A transform wants plain layers: `change` gives it one after
the other, with the parameter tree of each, and stacks what comes back as its configuration wants
it. `split` and `join` are the two halves of that.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import trees
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
    ValueError: when `layers` has another length than `config.layers`, or layers that are scanned
      together have parameters of different structures, shapes or types.
  """
  if len(layers) != len(config.layers):
    raise ValueError(f"join: {len(layers)} layer trees; allowed: {len(config.layers)}")
  stacks: dict[tuple[str, str], list[int]] = {}
  for number, (segment, name, _) in enumerate(places(config)):
    stacks.setdefault((segment, name), []).append(number)
  params = dict(rest)
  for (segment, name), (first, *others) in stacks.items():
    for other in others:
      _check_alike(layers, first, other)
    alike = [layers[number] for number in (first, *others)]
    stacked = jax.tree.map(_stack, *alike) if others else layers[first]
    params.setdefault(segment, {})[name] = stacked
  return params


def change(
  config: TransformerConfig,
  params: Params,
  f: Callable[[int, LayerSpec, PyTree], tuple[LayerSpec, PyTree]],
) -> tuple[TransformerConfig, dict]:
  """The model with f(index, spec, tree) in place of each layer's specification and parameters.

  Layers that are equal afterwards are scanned together, whether they were before or not.

  Raises:
    ValueError: as `join`.

  Example:
    >>> from effjax.layers import MLP
    >>> layers = (LayerSpec(None, MLP(6)),) * 2
    >>> params = {"segments_0": {"layers_0": {"bias": jnp.zeros((2, 6))}}}
    >>> apart = lambda i, spec, tree: (dataclasses.replace(spec, tag=i), tree)
    >>> config, params = change(TransformerConfig(8, 4, layers), params, apart)
    >>> [(name, part["layers_0"]["bias"].shape) for name, part in params.items()]
    [('segments_0', (6,)), ('segments_1', (6,))]
  """
  layers, rest = split(config, params)
  changed = [f(*layer) for layer in zip(range(len(layers)), config.layers, layers, strict=True)]
  config = dataclasses.replace(config, layers=tuple(spec for spec, _ in changed))
  return config, join(config, [tree for _, tree in changed], rest)


def split_caches(config: TransformerConfig, caches: PyTree) -> list[PyTree]:
  """What each layer keeps, of the caches of a model."""
  found: list[PyTree] = []
  for segment, kept in zip(segments(config), caches, strict=True):
    one = lambda i, kept=kept: jax.tree.map(lambda x: x[i], kept)
    found += kept if segment.repeats == 1 else sum(map(one, range(segment.repeats)), ())
  return found


def unscan(config: TransformerConfig, params: Params) -> tuple[TransformerConfig, dict]:
  """The same model with every layer on its own: slower to compile, no slicing when it runs."""
  flat = dataclasses.replace(config, scan=False)
  return flat, join(flat, *split(config, params))


def _check_alike(layers: list[PyTree], first: int, other: int) -> None:
  """Raises ValueError unless the trees of two layers can be stacked."""
  a, b = ({p: _form(x) for p, x in trees.items(layers[i]).items()} for i in (first, other))
  for path in dict.fromkeys((*a, *b)):
    if a.get(path) != b.get(path):
      raise ValueError(
        f"join: layers {first} and {other} are scanned together, and {path} is "
        f"{a.get(path, 'absent')} in the one, {b.get(path, 'absent')} in the other; allowed: the "
        "same in both, or a LayerSpec.tag of its own for each kind of layer"
      )


def _form(leaf: Any) -> str:
  """All of an array or a weight that has to agree where it is stacked: its type, shape, fields."""
  if trees.is_weight(leaf):
    fields = ((field.name, getattr(leaf, field.name)) for field in dataclasses.fields(leaf))
    inside = ", ".join(f"{name}={_form(value)}" for name, value in fields)
    return f"{type(leaf).__name__}({inside})"
  if isinstance(leaf, dict):
    return ", ".join(f"{name}: {_form(value)}" for name, value in sorted(leaf.items()))
  return f"{leaf.dtype} {tuple(leaf.shape)}" if hasattr(leaf, "dtype") else repr(leaf)


def _stack(*leaves):
  return np.stack(leaves) if isinstance(leaves[0], np.ndarray) else jnp.stack(leaves)
