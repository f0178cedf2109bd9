"""Which layers have a prefix, and configurations with another."""

import dataclasses

from effjax.attention.multi_head import Attention
from effjax.attention.prefix import TrainedPrefix
from effjax.layers.spec import LayerSpec, TransformerConfig


def of(config: TransformerConfig) -> TrainedPrefix:
  """The prefix that a model has.

  Raises:
    ValueError: when no layer has one.
  """
  for spec in config.layers:
    if (found := prefix_of(spec)) is not None:
      return found
  raise ValueError("config has no prefix; allowed: what prefix.add returns")


def replaced(config: TransformerConfig, prefix: TrainedPrefix) -> TransformerConfig:
  """`config` with `prefix` wherever there is one."""
  change = lambda spec: spec if prefix_of(spec) is None else with_prefix(spec, prefix)
  return dataclasses.replace(config, layers=tuple(map(change, config.layers)))


def attention(spec: LayerSpec) -> Attention:
  """The mixer of a layer that is known to be of attention."""
  assert isinstance(spec.mixer, Attention)
  return spec.mixer


def prefix_of(spec: LayerSpec) -> TrainedPrefix | None:
  return getattr(spec.mixer, "prefix", None)


def with_prefix(spec: LayerSpec, prefix: TrainedPrefix | None) -> LayerSpec:
  return dataclasses.replace(spec, mixer=attention(spec).clone(prefix=prefix))
