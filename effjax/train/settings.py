"""What a run depends on, kept beside its checkpoints so that they are taken for no other run's.

The program of a step is compared as JAX traced it: objective, optimiser, microbatches and every
number in them. Parameters at the start are compared by mean and root mean square, since their last
digits differ between devices.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from effjax.core import trees
from effjax.core.typing import Key
from effjax.parallel.placement import Placement
from effjax.train import workdir
from effjax.train.objectives import Batch
from effjax.train.state import TrainState
from effjax.train.step import Step

FILE = "settings.json"
TOLERANCE = 1e-5  # of the root mean square
CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Settings:
  """Those of one call of `fit`.

  Attributes:
    directory: where they are kept.
    step: the step.
    rng: the randomness of the run.
    placement: where arrays live.
    start: path → (mean, root mean square) of the state before the first step.
  """

  directory: Path
  step: Step
  rng: Key
  placement: Placement | None
  start: dict[str, tuple[float, float]]

  def write(self, state: TrainState, batch: Batch) -> None:
    """Keeps them; `state` and `batch` give shapes."""
    text = json.dumps(self._describe(state, batch), indent=2)
    workdir.write_text(self.directory / FILE, text + "\n")

  def check(self, state: TrainState) -> None:
    """Compares them with those kept, if there are any.

    Raises:
      ValueError: when they differ, naming what does.
    """
    path = self.directory / FILE
    if not path.exists():
      return
    there = workdir.read_json(path)
    shapes = {name: jax.ShapeDtypeStruct(*form) for name, form in there["batch"].items()}
    here = json.loads(json.dumps(self._describe(state, shapes)))
    different = [*_programs(there, here), *_starts(there["start"], here["start"])]
    if there["rng"] != here["rng"]:
      different.append(f"rng is {there['rng']} there and {here['rng']} here")
    if different:
      raise ValueError(
        f"workdir {str(self.directory)!r} has checkpoints of other settings: "
        f"{'; '.join(different)}; allowed: the same settings, another workdir, or the same without "
        f"its {FILE}, to go on all the same"
      )

  def _describe(self, state: TrainState, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {
      "traced": _traced(self.placement),
      "program": _program(self.step.trace(state, batch, self.rng)),
      "batch": {name: [list(x.shape), str(x.dtype)] for name, x in batch.items()},
      "rng": _plain(self.rng).tolist(),
      "start": self.start,
    }


def moments(state: TrainState) -> dict[str, tuple[float, float]]:
  """Path → mean and root mean square of the arrays that a run starts from."""
  tree = {"params": state.params, "extra": state.extra}
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {trees.path_string(path): _moments(_plain(x)) for path, x in leaves}


def _moments(x: np.ndarray) -> tuple[float, float]:
  flat, total, squares = x.reshape(-1), 0.0, 0.0
  for first in range(0, flat.size, CHUNK):
    part = flat[first : first + CHUNK].astype(np.float64)
    total, squares = total + part.sum(), squares + np.square(part).sum()
  size = max(flat.size, 1)
  return float(total / size), math.sqrt(squares / size)


def _plain(x: Any) -> np.ndarray:
  is_key = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return np.asarray(jax.random.key_data(x) if is_key else x)


def _traced(placement: Placement | None) -> dict[str, str]:
  """What a trace depends on besides the settings."""
  where = repr(placement).partition(" object at ")[0]
  return {"jax": jax.__version__, "backend": jax.default_backend(), "placement": where}


def _programs(there: dict, here: dict) -> Iterator[str]:
  if there["traced"] != here["traced"]:
    changed = [name for name, value in here["traced"].items() if there["traced"].get(name) != value]
    print(f"{', '.join(changed)} changed since {FILE} was written: the step is not compared")
  elif there["program"]["digest"] != here["program"]["digest"]:
    numbers = [set(each["program"]["numbers"]) for each in (there, here)]
    only = [sorted(a - b) for a, b in (numbers, numbers[::-1])]
    said = f": it computes with {only[0]} there and {only[1]} here" if any(only) else ""
    yield f"the step (objective, optimiser, microbatches) is another{said}"


def _starts(there: dict[str, list], here: dict[str, list]) -> Iterator[str]:
  close = lambda a, b: np.allclose(a, b, rtol=0, atol=TOLERANCE * a[1] + 1e-12, equal_nan=True)
  paths = dict.fromkeys((*there, *here))
  different = [p for p in paths if not (p in there and p in here and close(there[p], here[p]))]
  if different:
    yield f"the run starts from another {trees.some(different, 3)}"


def _program(jaxpr: jex.ClosedJaxpr) -> dict[str, Any]:
  """Digest of a traced program, and the fractions in it, for messages."""
  words = list(_words(jaxpr))
  numbers = {f"{x:.6g}" for x in words if isinstance(x, float) and x % 1}
  text = "\n".join(map(repr, words))
  return {
    "digest": hashlib.sha256(text.encode()).hexdigest(),
    "numbers": sorted(numbers, key=float),
  }


def _words(value: Any) -> Iterator[Any]:
  """A traced program as words, without names and whatever has no value of its own."""
  match value:
    case jex.ClosedJaxpr() | jex.Jaxpr():  # one class in newer JAX
      yield from _equations(value)
      yield from _words(list(getattr(value, "consts", ())))
    case list() | tuple():
      for each in value:
        yield from _words(each)
    case None | bool() | int() | float() | str():
      yield value
    case np.ndarray() | np.generic() | jax.Array():
      plain = _plain(value)
      yield plain.item() if plain.ndim == 0 else (str(plain.dtype), plain.shape, plain.tobytes())


def _equations(jaxpr: jex.ClosedJaxpr | jex.Jaxpr) -> Iterator[Any]:
  names: dict[Any, int] = {}
  for equation in jaxpr.eqns:
    yield equation.primitive.name
    for x in equation.invars:
      if isinstance(x, jex.Literal):
        yield from _words(x.val)
      else:
        yield names.setdefault(x, len(names))
    for x in equation.outvars:
      yield names.setdefault(x, len(names))
      yield str(x.aval)
    for name, value in sorted(equation.params.items()):
      if name != "name":
        yield from _words(value)
