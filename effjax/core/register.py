"""The registry of weight representations: dataclasses that are pytrees and say what trains."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")

KINDS = {
  "matrix": "another form of a matrix, trained with everything else",
  "quantised": "stands for a matrix that no longer trains; `quant.dequantize` undoes it",
  "adapter": "trained beside a frozen base; where there is one, adapters alone train",
  "wrapper": "made for the moment of a product and never stored",
}
REPRESENTATIONS: dict[str, type] = {}


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def register(
  *, static: tuple[str, ...] = (), trains: tuple[str, ...] | None = None, kind: str = "matrix"
) -> Callable[[type[T]], type[T]]:
  """Class decorator: a frozen dataclass and pytree, known to `REPRESENTATIONS` unless a "wrapper".

  Fields are arrays, or weights, but for `static` ones. Annotate them as `PyTree`: tree maps put
  shapes, shardings and None in their place. Fields are checked when a weight is made by its
  constructor, not when a tree map makes one.

  Args:
    static: fields that are no arrays, besides those of the class it is made from; hashable.
    trains: fields that receive gradients where nothing else is asked for (`trees.trained`); None
      is all of them, and none of a "quantised" one.
    kind: one of `KINDS`.

  Raises:
    ValueError: for a field or a kind that there is none of, and for a name of the library's.
  """
  if kind not in KINDS:
    raise ValueError(f"register: kind={kind!r}; allowed: {', '.join(KINDS)}")
  for argument, value in (("static", static), ("trains", trains or ())):
    if not isinstance(value, tuple):
      raise ValueError(f"register: {argument}={value!r}; allowed: a tuple of names of fields")

  def wrap(cls: type[T]) -> type[T]:
    made: Any = dataclasses.dataclass(frozen=True, repr=False)(cls)
    names = [field.name for field in dataclasses.fields(made)]
    fixed = tuple(dict.fromkeys((*getattr(cls, "static", ()), *static)))
    if unknown := {*fixed, *(trains or ())} - set(names):
      raise ValueError(f"register: {cls.__name__} has no field {sorted(unknown)}; allowed: {names}")
    if both := sorted({*fixed} & {*(trains or ())}):
      raise ValueError(f"register: {cls.__name__} trains {both}, which are static; allowed: arrays")
    arrays = [name for name in names if name not in fixed]
    default = () if kind == "quantised" else tuple(arrays)
    made.static, made.trains, made.kind = fixed, default if trains is None else trains, kind
    _register_pytree(made, arrays, fixed)
    if kind != "wrapper":
      _refuse_other(made)
      REPRESENTATIONS[made.__name__] = made
    return made

  return wrap


def _refuse_other(cls: type) -> None:
  """Raises ValueError where the library knows another class by the name of `cls`."""
  known = REPRESENTATIONS.get(cls.__name__, cls)
  if known.__module__.startswith("effjax.") and known.__module__ != cls.__module__:
    raise ValueError(
      f"register: {known.__module__} has a representation called {cls.__name__}; allowed: a name "
      "of its own, by which files and `quant.quantize` know it"
    )


def _register_pytree(cls: type, arrays: Sequence[str], static: tuple[str, ...]) -> None:
  keys = [jax.tree_util.GetAttrKey(name) for name in arrays]
  values = lambda w: [getattr(w, name) for name in arrays]
  constants = lambda w: tuple(getattr(w, name) for name in static)

  def unflatten(constants, children):
    new = object.__new__(cls)
    for name, value in (*zip(arrays, children, strict=True), *zip(static, constants, strict=True)):
      object.__setattr__(new, name, value)
    return new

  with_keys = lambda w: (list(zip(keys, values(w), strict=True)), constants(w))
  flatten = lambda w: (values(w), constants(w))
  jax.tree_util.register_pytree_with_keys(cls, with_keys, unflatten, flatten)
