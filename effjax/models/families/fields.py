"""Descriptions of others, read field by field: what nobody read is refused by name.

A family states its optional fields with the values that they stand for when they are left out, and
reads each by its type. A field that is left over might change what a model computes, so it is an
error, unless it is known to be harmless or null.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from effjax.layers.spec import TransformerConfig
from effjax.models.families.harmless import CONFIG

MOST_LAYERS = 10_000
LARGEST = 2**31
# Fields of every family that must be as they are when left out.
EVERYWHERE: dict[str, tuple] = {
  "is_encoder_decoder": (False, None),
  "is_causal": (True,),
  "add_cross_attention": (False, None),
  "pruned_heads": ({}, None),
  "per_layer_config": ({}, None),
}
REQUIRED = object()


class Fields:
  """A JSON object or the metadata of a GGUF file, from which each field is read by its type.

  Args:
    where: what errors begin with.
    values: the object.
    defaults: name → value of each field that may be left out.
    layers: the most layers that there can be.
    noun: what errors call a field.

  Raises:
    ValueError: when `values` is no object; by all methods for a field that is missing, of another
      type, or out of range, naming it, what it is and what is allowed.
  """

  def __init__(
    self,
    where: str,
    values: Any,
    defaults: Mapping[str, Any] | None = None,
    layers: int = MOST_LAYERS,
    noun: str = "field",
  ):
    if not isinstance(values, Mapping):
      raise ValueError(f"{where}: {_shown(values)}; allowed: an object")
    self.where, self._values, self._defaults = where, values, defaults or {}
    self.most_layers, self._noun = layers, noun
    self._read: set[str] = set()

  def __contains__(self, name: str) -> bool:
    return self._values.get(name) is not None

  def __bool__(self) -> bool:
    return bool(self._values)

  def names(self) -> list[str]:
    """The names of all fields."""
    return list(self._values)

  def assume(self, values: Mapping[str, Any]) -> None:
    """Adds fields that are not there."""
    self._values = {**values, **self._values}

  def unused(self, *names: str) -> None:
    """Passes over fields that have no influence in this family."""
    self._read.update(names)

  def raw(self, name: str) -> Any:
    """The field whatever its type, or what it stands for when left out."""
    self._read.add(name)
    value = self._values.get(name, self._defaults.get(name, REQUIRED))
    if value is REQUIRED:
      raise self._missing(name)
    return value

  def wrong(self, name: str, allowed: str) -> ValueError:
    """The error for a field with another value than those `allowed`."""
    return ValueError(f"{self.where}: {name}={_shown(self._values.get(name))}; allowed: {allowed}")

  def integer(self, name: str, *, least: int = 1, null: bool = False) -> Any:
    """An integer from `least`; with `null`, None where the field is null."""
    value = self._typed(name, (int,), null, "integers")
    if value is not None and not least <= value < LARGEST:
      raise self.wrong(name, f"from {least}, below {LARGEST}")
    return value

  def number(
    self, name: str, *, null: bool = False, positive: bool = True, whole: bool = True
  ) -> Any:
    """A finite number as float, positive unless said otherwise; `null` as in `integer`.

    Without `whole`, it has to be written with a point, as transformers demands of some.
    """
    kinds, allowed = ((int, float), "numbers") if whole else ((float,), "numbers with a point")
    value = self._typed(name, kinds, null, allowed)
    if value is None:
      return None
    try:
      value = float(value)
    except OverflowError:
      value = math.inf
    if not math.isfinite(value) or (positive and value <= 0):
      raise self.wrong(name, "positive numbers" if positive else "finite numbers")
    return value

  def eps(self, name: str) -> float:
    """What keeps a norm from dividing by zero, a positive number below 1."""
    value = self.number(name, whole=False)
    if value >= 1:
      raise self.wrong(name, "below 1")
    return value

  def flag(self, name: str) -> bool:
    """True or false; null is the default."""
    return self._typed(name, (bool,), False, "true, false")

  def text(self, name: str, *, null: bool = False) -> Any:
    """A string; `null` as in `integer`."""
    return self._typed(name, (str,), null, "text")

  def items(self, name: str, kinds: tuple[type, ...], length: int | None = None) -> Any:
    """A list of values of these types, of `length` if given; None where it is null."""
    value = self.raw(name)
    if value is None:
      return None
    right = isinstance(value, list) and all(type(item) in kinds for item in value)
    if not right or (length is not None and len(value) != length):
      names = " or ".join(kind.__name__ for kind in kinds)
      raise self.wrong(name, f"a list of {'' if length is None else f'{length} '}{names}")
    return value

  def numbers(self, name: str) -> tuple[float, ...]:
    """A list of finite positive numbers."""
    values = self.items(name, (int, float)) or []
    if not values or not all(0 < value < math.inf for value in values):
      raise self.wrong(name, "a list of positive numbers")
    return tuple(map(float, values))

  def ids(self, name: str) -> tuple[int, ...]:
    """A token id, or a list of some; none where it is null or left out."""
    self._read.add(name)
    value = self._values.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
      raise self.wrong(name, "a token id, or a list of some")
    return tuple(ids)

  def need(self, name: str, *allowed: Any) -> Any:
    """The field, which must be one of `allowed`; left out, it stands for the first of them."""
    self._read.add(name)
    value = self._values.get(name, allowed[0])
    if not any(type(value) is type(other) and value == other for other in allowed):
      raise self.wrong(name, ", ".join(map(repr, allowed)))
    return value

  def choice(self, name: str, allowed: Collection[str]) -> str:
    """A string that is one of `allowed`."""
    value = self.raw(name)
    if not isinstance(value, str) or value not in allowed:
      raise self.wrong(name, ", ".join(map(repr, allowed)))
    return value

  def depth(self, name: str) -> int:
    """A number of layers."""
    value = self.integer(name)
    if value > self.most_layers:
      raise self.wrong(name, f"up to {self.most_layers}, as many as there are tensors for")
    return value

  def inner(self, name: str, defaults: Mapping[str, Any] | None = None) -> "Fields":
    """The object in a field; an empty one where the field is null or left out."""
    self._read.add(name)
    value = self._values.get(name)
    where = f"{self.where}: {name}"
    return Fields(where, {} if value is None else value, defaults, self.most_layers)

  def renamed(self, aliases: Mapping[str, str]) -> "Fields":
    """The same with one name for each field.

    Raises:
      ValueError: for a field with two names that say different things.
    """
    values = dict(self._values)
    for alias in aliases.keys() & self._values.keys():
      value, name = values.pop(alias), aliases[alias]
      if value is not None and values.setdefault(name, value) != value:
        raise self.wrong(alias, f"what {name}={_shown(values[name])} says")
    return Fields(self.where, values, self._defaults, self.most_layers)

  def updated(self, other: "Fields") -> "Fields":
    """The fields of `other`, and of this one what it lacks."""
    where = other.where if other else self.where
    return Fields(where, {**self._values, **other._values}, self._defaults, self.most_layers)

  def finish(self, harmless: Collection[str] = CONFIG) -> None:
    """Refuses what was not read, is not null and not `harmless`."""
    for name, value in self._values.items():
      if name not in self._read and name not in harmless and value is not None:
        raise ValueError(
          f"{self.where}: {self._noun} {name!r}={_shown(value)} is not known, and might change "
          "what is computed; allowed: to leave it out, if it has no influence"
        )

  def _typed(self, name: str, kinds: tuple[type, ...], null: bool, allowed: str) -> Any:
    value = self.raw(name)
    if value is None and not null:
      value = self._defaults.get(name)
      if value is None:
        raise self._missing(name)
    if value is not None and type(value) not in kinds:
      raise self.wrong(name, allowed)
    return value

  def _missing(self, name: str) -> ValueError:
    return ValueError(f"{self.where}: {self._noun} {name!r} is missing")


def _shown(value: Any) -> str:
  try:
    text = repr(value)
  except RecursionError:
    return "something nested too deeply"
  return text if len(text) <= 200 else f"{text[:200]}…"


def complete(defaults: Mapping[str, Any], aliases: Mapping[str, str] | None = None) -> Callable:
  """Makes a function of `Fields` with these defaults one of a dict, which it has to read wholly.

  The function that comes out takes (config, where="config", layers=MOST_LAYERS). `aliases` are
  other names of fields; where a field has two names, both have to say the same.
  """

  def decorate(function: Callable[[Fields], TransformerConfig]) -> Callable:
    @functools.wraps(function)
    def read(
      config: Mapping[str, Any], where: str = "config", layers: int = MOST_LAYERS
    ) -> TransformerConfig:
      fields = Fields(where, config, defaults, layers).renamed(aliases or {})
      found = function(fields)
      for name, allowed in EVERYWHERE.items():
        fields.need(name, *allowed)
      fields.finish()
      return found

    return read

  return decorate
