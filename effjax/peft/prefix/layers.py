"""Which layers have a prefix, and configurations with another."""

import dataclasses
from typing import Any

from effjax.layers.prefix import TrainedPrefix
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


def prefix_of(spec: LayerSpec) -> TrainedPrefix | None:
  """The prefix of a layer's attention, None where there is none."""
  return getattr(spec.mixer, "prefix", None)


def with_prefix(spec: LayerSpec, prefix: TrainedPrefix | None) -> LayerSpec:
  """The layer with another prefix, or with none."""
  mixer: Any = spec.mixer
  return dataclasses.replace(spec, mixer=mixer.clone(prefix=prefix))
