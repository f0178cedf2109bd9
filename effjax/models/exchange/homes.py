"""The module that a tensor of a published model is in, for transformers 4 or 5."""

from typing import NamedTuple

from effjax.models.families.table import EXPERT, Family, Span
from effjax.models.layout import Piece

ROUTER = "ffn/router/kernel"


class Home(NamedTuple):
  """Where a tensor lies.

  Attributes:
    name: of the module.
    local: the same without the layer.
    kind: which tensor of the module it is, "weight" or "bias".
    span: which columns of that a parameter is, see `Entry`.
    is_stack: whether the matrices of all experts lie there.
    parameter: as `Module` has it.
  """

  name: str
  local: str
  kind: str
  span: Span | None
  is_stack: bool = False
  parameter: str | None = None


def home_of(family: Family, piece: Piece, width: int, *, stacks: bool) -> Home:
  """The module of a tensor, whose matrix has `width` columns of ours.

  Args:
    family, piece, width: of the tensor.
    stacks: whether experts and routers are parameters, as transformers 5 has them.
  """
  local = piece.entry.name.rpartition("{i}.")[2]
  if stacks and EXPERT in local:
    return _stack(family, piece, local, width)
  name, parameter = piece.tensor, None
  if stacks and piece.entry.path == ROUTER:
    for other, ours in family.renamed.items():
      name, local = name.replace(ours, other), local.replace(ours, other)
    parameter = ".weight"
  module, _, kind = name.rpartition(".")
  local = local.rpartition(f"{EXPERT}.")[2].rpartition(".")[0]
  return Home(module, local, kind, piece.span, parameter=parameter)


def _stack(family: Family, piece: Piece, local: str, width: int) -> Home:
  """The parameter that holds the experts' matrices, several side by side."""
  (name, parts), *_ = (item for item in family.stacked.items() if local in item[1])
  start, at = piece.tensor.removesuffix(local.format(e=piece.expert)), parts.index(local)
  span = (at * width, (at + 1) * width, len(parts) * width) if len(parts) > 1 else None
  return Home(start + name, name, "weight", span, True, "")
