"""The factors of a module in peft, from those of our parameters in it, and the other way.

Where a module holds several of our parameters side by side, one A and one B serve them all. Factors
of ours with the same A give that A, and their B side by side; others give a B in blocks, of the
ranks of all together, and `Factors.blocks` says which rows of A are whose.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from effjax.core import weights
from effjax.models.exchange.archive import Block
from effjax.models.exchange.modules import Adapters, Module, Part, View
from effjax.peft.dora import DoRA
from effjax.peft.low_rank import LoRA
from effjax.peft.starts import principal


class Factors(NamedTuple):
  """What a file has of a module.

  Attributes:
    a, b: [r, in] and [out, r].
    scale: s.
    magnitude: of DoRA, [out].
    blocks: path, rank and scale of each block, in order; None where one A is that of all.
    experts: how many matrices the factors are of.
  """

  a: np.ndarray
  b: np.ndarray
  scale: float
  magnitude: np.ndarray | None = None
  blocks: list[Block] | None = None
  experts: int = 1

  @property
  def rank(self) -> int:
    return len(self.a) // self.experts


def gathered(module: Module, adapters: Adapters, view: View) -> Factors | None:
  """The factors of a module from those of its parameters; None where none has some."""
  given = [(part, adapters[part.slot]) for part in module.parts if part.slot in adapters]
  if not given:
    return None
  a, b = ([np.asarray(getattr(w, name), np.float32).T for _, w in given] for name in "ab")
  scales = [np.asarray(w.scale, np.float32).item() for _, w in given]
  scale, magnitude = next(filter(None, scales), 0.0), _magnitude(module, adapters, view)
  alike = len({*scales}) == 1 and all(np.array_equal(a[0], other) for other in a)
  if alike and len(given) == len(module.parts):
    return Factors(a[0], np.concatenate(b), scale, magnitude)
  blocks: list[Block] = [
    [part.slot.path, len(x), s] for (part, _), x, s in zip(given, a, scales, strict=True)
  ]
  whole, at = np.zeros((module.outputs, sum(map(len, a))), np.float32), 0
  for (part, _), x, (_, rank, own) in zip(given, b, blocks, strict=True):
    whole[_columns(part), at : at + rank] = x * _ratio(own, scale)
    at += rank
  return Factors(np.concatenate(a), whole, scale, magnitude, blocks)


def scattered(module: Module, factors: Factors, dropout: float) -> Adapters:
  """The adapters of a module's parameters: the inverse of `gathered`."""
  if factors.blocks is None:
    whole = slice(None), factors.scale
    return {part.slot: _adapter(factors, part, *whole, dropout) for part in module.parts}
  by_path = {part.slot.path: part for part in module.parts}
  found, at = Adapters(), 0
  for path, rank, scale in factors.blocks:
    found[by_path[path].slot] = _adapter(
      factors, by_path[path], slice(at, at + rank), scale, dropout
    )
    at += rank
  return found


def fits(module: Module, factors: Factors, blocks: list[Block]) -> bool:
  """Whether B is 0 outside of the blocks, and they are all of it."""
  by_path, b, at = {part.slot.path: part for part in module.parts}, factors.b.copy(), 0
  if any(len(block) != 3 for block in blocks):
    return False
  for path, rank, _ in blocks:
    b[_columns(by_path[path]), at : at + rank] = 0
    at += rank
  return at == len(factors.a) and not b.any()


def rebased(module: Module, factors: Factors, view: View) -> Factors:
  """Factors over W that do what those of PiSSA do over W less its principal part.

  They are [A; A₀] and [B, −B₀], where s·A₀ B₀ is that part.
  """
  matrices = [weights.materialize(view.base(part.slot)) for part in module.parts]
  matrix = jnp.concatenate(matrices, axis=1).astype(jnp.float32)
  a, b = (np.asarray(x).T for x in principal(matrix, len(factors.a), factors.scale))
  return factors._replace(a=np.concatenate([factors.a, a]), b=np.concatenate([factors.b, -b], 1))


def _adapter(factors: Factors, part: Part, rows: slice, scale: float, dropout: float) -> LoRA:
  ratio = _ratio(scale, factors.scale)
  a, b = factors.a[rows].T, factors.b[_columns(part), rows].T / (ratio if ratio else 1)
  fields = (jnp.asarray(a), jnp.asarray(b), jnp.full((1, 1), scale, jnp.float32))
  if factors.magnitude is None:
    return LoRA(None, *fields, dropout=dropout)
  magnitude = jnp.asarray(factors.magnitude[None, _columns(part)])
  return DoRA(None, *fields, magnitude, dropout=dropout)


def _magnitude(module: Module, adapters: Adapters, view: View) -> np.ndarray | None:
  """That of DoRA; the norm of the columns of a parameter that has none."""
  if not any(isinstance(adapters.get(part.slot), DoRA) for part in module.parts):
    return None

  def of(part: Part) -> np.ndarray:
    w = adapters.get(part.slot)
    if isinstance(w, DoRA):
      return np.asarray(w.magnitude, np.float32)[0]
    matrix = np.asarray(weights.materialize(view.base(part.slot)), np.float32)
    return np.linalg.norm(matrix, axis=0)

  return np.concatenate([of(part) for part in module.parts])


def _columns(part: Part) -> slice:
  return slice(None) if part.span is None else slice(*part.span[:2])


def _ratio(scale: float, whole: float) -> np.ndarray:
  """By what B of a block of another scale is multiplied in that of the module."""
  return np.asarray(scale / whole if whole else 1, np.float32)
