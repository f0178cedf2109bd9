"""LoRA and DoRA as peft's folders have them: A [r, in] and B [out, r] of each module.

Where a module holds several of our parameters side by side, one A and one B serve them all. Factors
of ours with the same A give that A, and their B side by side; others give a B in blocks, of the
ranks of all together, and `Factors.blocks` says which rows of A are whose.
"""

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from effjax.core import weights
from effjax.models.exchange import choosing, ends, naming, whole
from effjax.models.exchange.archive import OURS, PREFIX, Archive, Parts, Written
from effjax.models.exchange.modules import Adapted, Adapters, Module, Part, View
from effjax.models.families.fields import Fields
from effjax.peft import DoRA, LoRA
from effjax.peft.starts import principal

TYPE = "LORA"
WEIGHTS = (LoRA, DoRA)
DEFAULTS: dict[str, Any] = {
  "r": 8,
  "lora_alpha": 8,
  "lora_dropout": 0.0,
  "bias": "none",
  "use_rslora": False,
  "use_dora": False,
  "fan_in_fan_out": False,
  "ensure_weight_tying": False,
  "init_lora_weights": True,
  "rank_pattern": None,
  "alpha_pattern": None,
}
# What would change the computation, and has to be as it is when left out.
ABSENT = {
  "lora_bias": (False, None),
  "use_qalora": (False, None),
  **{
    name: (None, [], {})
    for name in (
      "trainable_token_indices",
      "alora_invocation_tokens",
      "layer_replication",
      "target_parameters",
      "velora_config",
      "monteclora_config",
      "use_bdlora",
      "arrow_config",
      "kasa_config",
      "megatron_config",
    )
  },
}
# Starts that leave the base as it is, and the one that takes away what can be computed again.
STARTS = (True, False, "gaussian", "eva", "orthogonal", "pissa")
# What the starts are made with, and the size of groups that `use_qalora` would make.
HARMLESS = {
  "megatron_core",
  "qalora_group_size",
  "loftq_config",
  "eva_config",
  "corda_config",
  "lora_ga_config",
}
A_AND_B = ("lora_A.weight", "lora_B.weight")
OF_TABLES = ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
ENDINGS = (*A_AND_B, *OF_TABLES, MAGNITUDE, *whole.ENDINGS)


class Factors(NamedTuple):
  """What a file has of a module.

  Attributes:
    a, b: [r, in] and [out, r].
    scale: s.
    magnitude: of DoRA, [out].
    blocks: [our path, rank] of each block, in order; None where one A is that of all.
  """

  a: np.ndarray
  b: np.ndarray
  scale: float
  magnitude: np.ndarray | None = None
  blocks: list[list] | None = None


def read(fields: Fields, archive: Archive, view: View, parts: Parts) -> Adapted:
  """The model with the adapters of a folder.

  Raises:
    ValueError: for what the folder says or lacks, and what is of another shape.
  """
  for name, allowed in ABSENT.items():
    fields.need(name, *allowed)
  start = fields.need("init_lora_weights", *STARTS)
  fields.unused("fan_in_fan_out")  # says how a module holds its matrix, and the module is known
  rules, bias = choosing.read_rules(fields), fields.choice("bias", ("none", "all", "lora_only"))
  tied = fields.flag("ensure_weight_tying")
  modules, tensors = naming.tensors_of(view.family, view.modules, archive, ENDINGS)
  tied = tied and view.tied and ends.take_tied(archive, modules, tensors)
  adapted = {name for name, there in tensors.items() if {*A_AND_B, *OF_TABLES} & {*there}}
  choosing.check_adapted(archive, rules, modules, adapted)
  scales, found = _Scales(fields), {}
  for name in sorted(adapted):
    factors = _read_factors(archive, name, modules[name], scales)
    if start == "pissa":
      factors = _rebased(modules[name], factors, view)
    factors = factors._replace(blocks=_blocks(archive, name, modules[name], factors, parts))
    found |= _scattered(modules[name], factors, scales.dropout)
  found |= whole.read(archive, rules, bias, modules, tensors, adapted, view.base)
  return view.adapted(found, tied)


def write(view: View, adapters: Adapters) -> Written | None:
  """What a folder has to hold; None where peft's layout cannot say it."""
  low_rank = {slot: w for slot, w in adapters.items() if isinstance(w, LoRA)}
  kinds = {(type(w), w.dropout) for w in low_rank.values()}
  if len(kinds) != 1:
    return None
  (kind, dropout), modules = kinds.pop(), naming.named(view.family, view.modules)
  gathered = {name: _gathered(module, low_rank, view) for name, module in modules.items()}
  found = {name: factors for name, factors in gathered.items() if factors is not None}
  tensors: dict[str, np.ndarray] = {}
  for name, factors in found.items():
    tensors |= _tensors(f"{PREFIX}{name}.", modules[name], factors)
  beside = whole.write(adapters, modules, set(found))
  if beside is None:
    return None
  fields = {
    "lora_dropout": dropout,
    "bias": "none",
    "use_rslora": False,
    "use_dora": kind is DoRA,
    "fan_in_fan_out": any(modules[name].kind == "conv1d" for name in found),
    "init_lora_weights": True,
    "target_modules": choosing.shortest(found, modules),
    **_numbers(found, modules),
  }
  blocks = {name: factors.blocks for name, factors in found.items() if factors.blocks is not None}
  written = Written({**fields, **beside.fields}, {**tensors, **beside.tensors}, blocks)
  return ends.tie(written, adapters, modules) if view.tied else written


class _Scales:
  """Rank and scale of each module, by its full name."""

  def __init__(self, fields: Fields):
    self.rank, self.alpha = fields.integer("r"), fields.number("lora_alpha", positive=False)
    self.ranks = choosing.read_patterns(fields, "rank_pattern", (int,))
    self.alphas = choosing.read_patterns(fields, "alpha_pattern", (int, float))
    self.rs, self.dora = fields.flag("use_rslora"), fields.flag("use_dora")
    self.dropout = fields.number("lora_dropout", positive=False)
    if not 0 <= self.dropout < 1:
      raise fields.wrong("lora_dropout", "from 0, below 1")

  def of(self, name: str) -> tuple[int, float]:
    rank = choosing.pattern_value(self.ranks, name, self.rank)
    alpha = choosing.pattern_value(self.alphas, name, self.alpha)
    return rank, alpha / (rank**0.5 if self.rs else rank)


def _read_factors(archive: Archive, name: str, module: Module, scales: _Scales) -> Factors:
  rank, scale = scales.of(name)
  shapes = {"a": (rank, module.inputs), "b": (module.outputs, rank)}
  ends = dict(zip(shapes, OF_TABLES if module.kind == "embedding" else A_AND_B, strict=True))
  if scales.dora:
    shapes["magnitude"], ends["magnitude"] = (module.outputs,), MAGNITUDE
  prefix = f"{PREFIX}{name}."
  return Factors(
    **{what: archive.take(prefix + end, shapes[what]) for what, end in ends.items()}, scale=scale
  )


def _rebased(module: Module, factors: Factors, view: View) -> Factors:
  """Factors over W that do what those of PiSSA do over W less its principal part."""
  matrices = [weights.materialize(view.base(part.slot)) for part in module.parts]
  whole_matrix = jnp.concatenate(matrices, axis=1).astype(jnp.float32)
  a, b = map(np.asarray, principal(whole_matrix, len(factors.a), factors.scale))
  return factors._replace(
    a=np.concatenate([factors.a, a.T]), b=np.concatenate([factors.b, -b.T], axis=1)
  )


def _blocks(
  archive: Archive, name: str, module: Module, factors: Factors, given: Parts
) -> list[list] | None:
  """The blocks of a module, where the folder has some of its own; checked against B."""
  blocks = given.get(name)
  if blocks is None:
    return None
  spans = {part.slot.path: part.span or (0, module.outputs, 0) for part in module.parts}
  b, at = factors.b.copy(), 0
  for path, rank in blocks:
    first, last, _ = spans[path]
    b[first:last, at : at + rank], at = 0, at + rank
  if at != len(factors.a) or b.any():
    raise ValueError(
      f"{archive.path}: factors of {name!r} are not in the blocks that {OURS} says: {blocks}; "
      f"allowed: those, or no {OURS}"
    )
  return blocks


def _scattered(module: Module, factors: Factors, dropout: float) -> Adapters:
  """The adapters of a module's parameters: the inverse of `_gathered`."""
  if factors.blocks is None:
    return {part.slot: _lora(factors, part, slice(None), dropout) for part in module.parts}
  by_path = {part.slot.path: part for part in module.parts}
  found, at = {}, 0
  for path, rank in factors.blocks:
    rows, at = slice(at, at + rank), at + rank
    found[by_path[path].slot] = _lora(factors, by_path[path], rows, dropout)
  return found


def _lora(factors: Factors, part: Part, rows: slice, dropout: float) -> LoRA:
  columns = slice(None) if part.span is None else slice(*part.span[:2])
  a, b = jnp.asarray(factors.a[rows].T), jnp.asarray(factors.b[columns, rows].T)
  scale = jnp.full((1, 1), factors.scale, jnp.float32)
  if factors.magnitude is None:
    return LoRA(None, a, b, scale, dropout=dropout)
  magnitude = jnp.asarray(factors.magnitude[None, columns])
  return DoRA(None, a, b, scale, magnitude, dropout=dropout)


def _gathered(module: Module, adapters: Adapters, view: View) -> Factors | None:
  """The factors of a module from those of its parameters; None where none has some."""
  given = [(part, adapters[part.slot]) for part in module.parts if part.slot in adapters]
  if not given:
    return None
  a = [np.asarray(w.a, np.float32).T for _, w in given]
  scales = [np.asarray(w.scale, np.float32).item() for _, w in given]
  b = [
    np.asarray(w.b, np.float32).T * np.float32(scale / scales[0])
    for (_, w), scale in zip(given, scales, strict=True)
  ]
  magnitude = _magnitude(module, adapters, view)
  if len(given) == len(module.parts) and all(np.array_equal(a[0], other) for other in a):
    return Factors(a[0], np.concatenate(b), scales[0], magnitude)
  whole_b, at = np.zeros((module.outputs, sum(map(len, a))), np.float32), 0
  for (part, _), rows, x in zip(given, a, b, strict=True):
    first, last, _ = part.span or (0, module.outputs, 0)
    whole_b[first:last, at : at + len(rows)] = x
    at += len(rows)
  blocks = [[part.slot.path, len(rows)] for (part, _), rows in zip(given, a, strict=True)]
  return Factors(np.concatenate(a), whole_b, scales[0], magnitude, blocks)


def _magnitude(module: Module, adapters: Adapters, view: View) -> np.ndarray | None:
  """That of DoRA; the norm of the columns of a parameter that has none."""
  if not any(isinstance(adapters.get(part.slot), DoRA) for part in module.parts):
    return None

  def of(part: Part) -> np.ndarray:
    if part.slot in adapters:
      return np.asarray(adapters[part.slot].magnitude, np.float32)[0]
    matrix = np.asarray(weights.materialize(view.base(part.slot)), np.float32)
    return np.linalg.norm(matrix, axis=0)

  return np.concatenate([of(part) for part in module.parts])


def _tensors(prefix: str, module: Module, factors: Factors) -> dict[str, np.ndarray]:
  a, b = OF_TABLES if module.kind == "embedding" else A_AND_B
  found = {prefix + a: factors.a, prefix + b: factors.b}
  return found if factors.magnitude is None else found | {prefix + MAGNITUDE: factors.magnitude}


def _numbers(found: Mapping[str, Factors], modules: Mapping[str, Module]) -> dict[str, Any]:
  """The fields of ranks and α: those of most modules, and patterns for the others."""
  ranks = {name: len(factors.a) for name, factors in found.items()}
  alphas = {name: _alpha(factors.scale, ranks[name]) for name, factors in found.items()}
  rank, alpha = (collections.Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
  return {
    "r": rank,
    "lora_alpha": alpha,
    "rank_pattern": choosing.by_pattern(ranks, modules, rank),
    "alpha_pattern": choosing.by_pattern(alphas, modules, alpha),
  }


def _alpha(scale: float, rank: int) -> float:
  """α, of few digits where these give the scale α/r: that was computed in float32."""
  for digits in range(1, 9):
    alpha = float(f"{scale * rank:.{digits}g}")
    if np.float32(alpha / rank) == np.float32(scale):
      return int(alpha) if alpha.is_integer() else alpha
  return scale * rank
