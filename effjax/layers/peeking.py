"""Modules that look at later tokens of a sequence, and the models that must not have them.

A module or a router says so by two class attributes, of which it needs neither where it treats each
token by itself or looks back only:

  * `peeks = True`: what it gives for a token depends on later ones, so that no cache can go on from
    it;
  * `encoder_only = True`: in a causal model that would show each token what it has to predict.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn


def parts(value: Any) -> Iterator[nn.Module]:
  """A module and all modules that its fields hold, and theirs.

  Example:
    >>> [type(part).__name__ for part in parts(nn.Sequential([nn.Dense(2), nn.LayerNorm()]))]
    ['Sequential', 'Dense', 'LayerNorm']
  """
  if isinstance(value, list | tuple):
    for each in value:
      yield from parts(each)
  elif isinstance(value, nn.Module):
    yield value
    for field in dataclasses.fields(value):
      if field.name not in ("parent", "name"):
        yield from parts(getattr(value, field.name, None))


def is_causal(mixer: Any) -> bool:
  """Whether a mixer shows no token what comes after it: what its `causal` says, else yes."""
  return bool(getattr(mixer, "causal", True))


def check_direction(places: Mapping[str, nn.Module], mixers: Mapping[str, nn.Module]) -> None:
  """Refuses what is for encoders only among `places` where all `mixers` look back only.

  Args:
    places: where it stands → module.
    mixers: likewise; without any, no token sees another and all is allowed.

  Raises:
    ValueError: by name and place.
  """
  found = [(where, part) for where, part in _stated(places, "encoder_only")]
  if not found or not mixers or not all(map(is_causal, mixers.values())):
    return
  (where, part), (mixer, module) = found[0], next(iter(mixers.items()))
  raise ValueError(
    f"{where} has {type(part).__name__}, by which a token depends on later ones, in a causal model "
    f"({mixer} is {type(module).__name__}); allowed: mixers that see both sides, as "
    "Attention(mask=Full()), or a mixer that says causal=False"
  )


def check_caches(places: Mapping[str, nn.Module]) -> None:
  """Refuses caches for a model with something that peeks.

  Raises:
    ValueError: by name and place.
  """
  for where, part in _stated(places, "peeks"):
    raise ValueError(
      f"{where} has {type(part).__name__}, which looks at later tokens; allowed in generation and "
      "with caches: modules that look back only"
    )


def _stated(places: Mapping[str, nn.Module], name: str) -> Iterator[tuple[str, nn.Module]]:
  """Where and which part of a module states `name`."""
  for where, module in places.items():
    for part in parts(module):
      if getattr(part, name, False):
        yield where, part
