"""LoRA and DoRA as peft's folders have them: A [r, in] and B [out, r] of each module."""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from effjax.core.typing import Number
from effjax.models.exchange import choosing, ends, naming, whole
from effjax.models.exchange.archive import OURS, PREFIX, Archive, Parts, Written
from effjax.models.exchange.factors import Factors, fits, rebased
from effjax.models.exchange.modules import Adapted, Adapters, Module, View
from effjax.models.exchange.stacks import alike, divided, joined, placed
from effjax.models.families.fields import Fields
from effjax.peft.dora import DoRA
from effjax.peft.low_rank import LoRA

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
  "target_parameters": None,
}
# What would change the computation, and has to be as it is when left out.
ABSENT: dict[str, tuple] = {
  "lora_bias": (False, None),
  "use_qalora": (False, None),
  **{
    name: (None, [], {})
    for name in (
      "trainable_token_indices",
      "alora_invocation_tokens",
      "layer_replication",
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
  # Of transformers 5 and peft since there are parameters among the targets, else of transformers 4.
  there = view.modules if rules.parameters else view.one_by_one
  modules, tensors = naming.tensors_of(view.family, there, archive, ENDINGS, rules)
  choosing.check_parameters(fields, rules, modules)
  tied = tied and view.tied and ends.take_tied(archive, modules, tensors)
  adapted = {name for name, there in tensors.items() if {*A_AND_B, *OF_TABLES} & {*there}}
  choosing.check_adapted(archive, rules, modules, adapted, parts)
  scales, found = _Scales(fields), Adapters()
  for name in sorted(adapted):
    factors = _read_factors(archive, name, tensors[name], modules[name], scales)
    if start == "pissa":
      if modules[name].experts is not None:
        raise fields.wrong("init_lora_weights", "others than 'pissa' where experts are adapted")
      factors = rebased(modules[name], factors, view)
    blocks = parts.get(name)
    each = divided(modules[name], factors)
    if blocks is not None and not all(fits(*one, blocks) for one in each):
      raise ValueError(
        f"{archive.path}: factors of {name!r} are not in the blocks that {OURS} says: {blocks}; "
        f"allowed: those, or no {OURS}"
      )
    found |= placed(modules[name], factors._replace(blocks=blocks), scales.dropout)
  found |= whole.read(archive, rules, bias, modules, tensors, adapted, view.base)
  return view.adapted(found, tied)


def write(view: View, adapters: Adapters) -> Written | None:
  """What a folder has to hold; None where peft's layout cannot say it."""
  low_rank = {slot: w for slot, w in adapters.items() if isinstance(w, LoRA)}
  kinds = {(type(w), w.dropout) for w in low_rank.values()}
  if len(kinds) != 1 or not alike(low_rank):
    return None
  (kind, dropout), modules = kinds.pop(), naming.named(view.family, view.modules)
  every = {name: joined(module, low_rank, view) for name, module in modules.items()}
  found = {name: factors for name, factors in every.items() if factors is not None}
  parameters = [name for name in found if modules[name].parameter is not None]
  if parameters and (kind is DoRA or dropout):  # not so in peft
    return None
  stacks = (name for name in parameters if modules[name].experts is not None)
  names = naming.wrapped(modules, stacks)
  tensors: dict[str, np.ndarray] = {}
  for name, factors in found.items():
    tensors |= _tensors(f"{PREFIX}{names.get(name, name)}.", modules[name], factors)
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
    "target_modules": choosing.shortest(
      [name for name in found if name not in parameters], modules
    ),
    "target_parameters": choosing.shortest(parameters, modules) or None,
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


def _read_factors(
  archive: Archive, name: str, there: Mapping[str, str], module: Module, scales: _Scales
) -> Factors:
  rank, scale = scales.of(name + (module.parameter or ""))
  held = rank * (module.experts or 1)
  take = lambda end, *shape: archive.take(there.get(end, f"{PREFIX}{name}.{end}"), shape)
  of_a, of_b = _ends_of(module)
  a, b = take(of_a, held, module.inputs), take(of_b, module.outputs, held)
  magnitude = take(MAGNITUDE, module.outputs) if scales.dora else None
  return Factors(a, b, scale, magnitude, experts=module.experts or 1)


def _ends_of(module: Module) -> tuple[str, str]:
  return OF_TABLES if module.kind == "embedding" else A_AND_B


def _tensors(prefix: str, module: Module, factors: Factors) -> dict[str, np.ndarray]:
  a, b = _ends_of(module)
  found = {prefix + a: factors.a, prefix + b: factors.b}
  return found if factors.magnitude is None else found | {prefix + MAGNITUDE: factors.magnitude}


def _numbers(found: Mapping[str, Factors], modules: Mapping[str, Module]) -> dict[str, Any]:
  """The fields of ranks and α: those of most modules, and patterns for the others."""
  ranks = {name: factors.rank for name, factors in found.items()}
  alphas = {name: _alpha(factors.scale, ranks[name]) for name, factors in found.items()}
  rank, alpha = (collections.Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
  return {
    "r": rank,
    "lora_alpha": alpha,
    "rank_pattern": choosing.by_pattern(ranks, modules, rank),
    "alpha_pattern": choosing.by_pattern(alphas, modules, alpha),
  }


def _alpha(scale: float, rank: int) -> Number:
  """α, of few digits where these give the scale α/r: that was computed in float32."""
  for digits in range(1, 9):
    alpha = float(f"{scale * rank:.{digits}g}")
    if np.float32(alpha / rank) == np.float32(scale):
      return int(alpha) if alpha.is_integer() else alpha
  return scale * rank
