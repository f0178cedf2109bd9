"""The fields about rotary positions, as transformers has them, and `Rope`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from effjax.layers import Rope
from effjax.layers.rope_scaling import Divided, DynamicNTK, Llama3, Yarn
from effjax.models.families.fields import Fields

DEFAULTS = {
  "rope_type": "default",
  "attention_factor": None,
  "beta_fast": 32.0,
  "beta_slow": 1.0,
  "mscale": None,
  "mscale_all_dim": None,
  "truncate": True,
  "original_max_position_embeddings": None,
}
HARMLESS = {"finetuned"}


def given(fields: Fields) -> Fields:
  """`rope_scaling` where it says something, as transformers prefers it, else `rope_parameters`."""
  scaling, parameters = (
    fields.inner(name, DEFAULTS) for name in ("rope_scaling", "rope_parameters")
  )
  return scaling if scaling else parameters


def read(
  fields: Fields,
  *,
  theta: float,
  context: int,
  fraction: float | None = None,
  original: int | None = None,
  kinds: Mapping[str, Callable] | None = None,
) -> Rope:
  """The rotary positions that an object with `rope_type` and its like describes.

  Args:
    fields: the object, with `DEFAULTS`.
    theta: the base, where the object has none.
    context: the longest sequence.
    fraction: the share of a head that rotates, where the object has none; None where all must.
    original: the longest sequence before scaling, where a field of the family says it.
    kinds: what there can be as `rope_type`; None is `KINDS`.

  Raises:
    ValueError: for a field that is missing, wrong, or not known to that type.
  """
  kinds = KINDS if kinds is None else kinds
  name = "type" if "type" in fields and "rope_type" not in fields else "rope_type"
  kind = fields.choice(name, kinds)
  fields.need("type", kind, None)
  theta = fields.number("rope_theta") if "rope_theta" in fields else theta
  if "partial_rotary_factor" in fields:
    found = fields.number("partial_rotary_factor")
    if found > 1 or (fraction is None and found != 1):
      raise fields.wrong("partial_rotary_factor", "1.0" if fraction is None else "up to 1.0")
    fraction = found
  inside = fields.integer("original_max_position_embeddings", null=True)
  change = kinds[kind](fields, context, original or inside or context)
  fields.finish(HARMLESS)
  return Rope(theta, fraction=1.0 if fraction is None else fraction, **change)


def _default(fields: Fields, context: int, original: int) -> dict[str, Any]:
  return {}


def _linear(fields: Fields, context: int, original: int) -> dict[str, Any]:
  return {"factor": fields.number("factor")}


def _dynamic(fields: Fields, context: int, original: int) -> dict[str, Any]:
  # transformers stretches `max_position_embeddings`, whatever else is said.
  fields.need("original_max_position_embeddings", None, context)
  return {"scaling": DynamicNTK(_factor(fields), context)}


def _llama3(fields: Fields, context: int, original: int) -> dict[str, Any]:
  low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
  if high <= low:
    raise fields.wrong("high_freq_factor", f"more than low_freq_factor={low}")
  return {"scaling": Llama3(fields.number("factor"), low, high, original)}


def _yarn(fields: Fields, context: int, original: int) -> dict[str, Any]:
  factor = context / original
  if "factor" in fields:
    factor = fields.number("factor")
  scale = lambda weight: 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
  amplitude = fields.number("attention_factor", null=True)
  over, under = (fields.number(name, null=True, positive=False) for name in _MSCALE)
  if amplitude is None:
    amplitude = scale(over) / scale(under) if over and under else scale(1.0)
  fast, slow = fields.number("beta_fast"), fields.number("beta_slow")
  if fast < slow:
    raise fields.wrong("beta_fast", f"from beta_slow={slow}")
  truncate = fields.flag("truncate")
  return {"scaling": Yarn(factor, original, amplitude, fast, slow, truncate)}


_MSCALE = ("mscale", "mscale_all_dim")


def _longrope(fields: Fields, context: int, original: int) -> dict[str, Any]:
  factor = fields.number("factor") if "factor" in fields else context / original
  amplitude = fields.number("attention_factor", null=True)
  if amplitude is None:
    amplitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
  short, long = (fields.numbers(f"{name}_factor") for name in ("short", "long"))
  return {"scaling": Divided(short, long, original, amplitude)}


def _factor(fields: Fields) -> float:
  factor = fields.number("factor")
  if factor < 1:
    raise fields.wrong("factor", "from 1")
  return factor


KINDS: dict[str, Callable[[Fields, int, int], dict[str, Any]]] = {
  "default": _default,
  "linear": _linear,
  "dynamic": _dynamic,
  "llama3": _llama3,
  "yarn": _yarn,
  "longrope": _longrope,
}
# Phi-3 has called its own type three names.
PHI3_KINDS = {"default": _default, "longrope": _longrope, "su": _longrope, "yarn": _longrope}


def stretched(value: Rope | None, context: int) -> int:
  """The longest sequence, given `max_position_embeddings`: some types count from before scaling."""
  match getattr(value, "scaling", None):
    case DynamicNTK(factor, original) | Yarn(factor, original):
      return max(context, int(factor * original))
  return context


def unstretched(value: Rope | None, context: int) -> int:
  """`max_position_embeddings` of a model whose longest sequence is `context`."""
  scaling = getattr(value, "scaling", None)
  return scaling.context if isinstance(scaling, DynamicNTK) else context


def write(value: Rope) -> dict[str, Any]:
  """`rope_theta` and `rope_scaling`, which `given` and `read` read.

  Raises:
    ValueError: for a type of scaling that has no name.
  """
  return {"rope_theta": value.theta, "rope_scaling": _written(value)}


def _written(value: Rope) -> dict[str, Any] | None:
  scaling = value.scaling
  if scaling is None:
    return None if value.factor == 1.0 else {"rope_type": "linear", "factor": value.factor}
  if value.factor != 1.0 or type(scaling) not in WRITERS:
    raise ValueError(f"rope={value}; allowed: factor alone, or a scaling of effjax.layers alone")
  return WRITERS[type(scaling)](scaling)


def _write_llama3(scaling: Llama3) -> dict[str, Any]:
  return {
    "rope_type": "llama3",
    "factor": scaling.factor,
    "low_freq_factor": scaling.low,
    "high_freq_factor": scaling.high,
    "original_max_position_embeddings": scaling.context,
  }


def _write_yarn(scaling: Yarn) -> dict[str, Any]:
  return {
    "rope_type": "yarn",
    "factor": scaling.factor,
    "original_max_position_embeddings": scaling.context,
    "attention_factor": scaling.amplitude,
    "beta_fast": scaling.fast,
    "beta_slow": scaling.slow,
    "truncate": scaling.whole,
  }


def _write_divided(scaling: Divided) -> dict[str, Any]:
  return {
    "rope_type": "longrope",
    "short_factor": list(scaling.short),
    "long_factor": list(scaling.long or scaling.short),
    "original_max_position_embeddings": scaling.context,
    "attention_factor": scaling.amplitude,
  }


WRITERS: dict[type, Callable[[Any], dict[str, Any]]] = {
  DynamicNTK: lambda scaling: {"rope_type": "dynamic", "factor": scaling.factor},
  Llama3: _write_llama3,
  Yarn: _write_yarn,
  Divided: _write_divided,
}
