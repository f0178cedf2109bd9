"""Factors of experts as transformers 5 holds these, all of a layer in one parameter.

A is [E·r, in], one expert after another, and B [out, r·E], in which the experts lie innermost.
"""

import numpy as np

from effjax.models.exchange.factors import Factors, gathered, scattered
from effjax.models.exchange.modules import Adapters, Module, View


def alike(adapters: Adapters) -> bool:
  """Whether the experts of each layer have one rank and scale, as peft has them."""
  found: dict[tuple, set] = {}
  for slot, w in adapters.items():
    form = w.a.shape, np.asarray(w.scale, np.float32).item()
    found.setdefault((slot.layer, slot.path), set()).add(form)
  return all(len(forms) == 1 for forms in found.values())


def joined(module: Module, adapters: Adapters, view: View) -> Factors | None:
  """As `gathered`, of all experts where the module is a stack."""
  if module.experts is None:
    return gathered(module, adapters, view)
  found = [gathered(module.one(e), adapters, view) for e in range(module.experts)]
  there = [factors for factors in found if factors is not None]
  if not there:
    return None
  a, b = (np.stack([getattr(factors, name) for factors in there]) for name in "ab")
  b = b.transpose(1, 2, 0).reshape(b.shape[1], -1)
  return there[0]._replace(a=a.reshape(-1, a.shape[-1]), b=b, experts=len(there))


def divided(module: Module, factors: Factors) -> list[tuple[Module, Factors]]:
  """A module and its factors, or those of each expert of a stack."""
  if module.experts is None:
    return [(module, factors)]
  a = factors.a.reshape(module.experts, -1, module.inputs)
  b = factors.b.reshape(module.outputs, -1, module.experts)
  each = (factors._replace(a=a[e], b=b[..., e], experts=1) for e in range(module.experts))
  return [(module.one(e), own) for e, own in enumerate(each)]


def placed(module: Module, factors: Factors, dropout: float) -> Adapters:
  """As `scattered`, of all experts where the module is a stack."""
  found = Adapters()
  for one, own in divided(module, factors):
    found |= scattered(one, own, dropout)
  return found
