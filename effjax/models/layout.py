"""Where each of our parameters lies in a family's layout."""

import dataclasses
from collections.abc import Mapping, Sequence

from effjax.core import trees
from effjax.core.typing import PyTree
from effjax.layers.spec import TransformerConfig
from effjax.layers.stack import places
from effjax.models.families.table import EXPERT, Entry, Family, Span


@dataclasses.dataclass(frozen=True)
class Piece:
  """One tensor of one parameter.

  Attributes:
    entry: where it lies in the layout.
    tensor: its name.
    layer: the place of its layer in the stack, or None when it is not stacked.
    expert: the expert that it is of, where the parameter holds those of all.
    span: which part of the tensor the parameter is, see `Entry`.
  """

  entry: Entry
  tensor: str
  layer: int | None = None
  expert: int | None = None
  span: Span | None = None

  @property
  def index(self) -> tuple[int, ...]:
    """Where it lies along the leading axes of the parameter."""
    return tuple(number for number in (self.layer, self.expert) if number is not None)


def plan_tensors(
  family: Family, config: TransformerConfig, params: PyTree
) -> dict[str, list[Piece]]:
  """For the path of each parameter, the tensors it consists of.

  Raises:
    ValueError: for a parameter that the family has no tensor for.
  """
  shapes = {path: leaf.shape for path, leaf in trees.items(params).items()}
  plan: dict[str, list[Piece]] = {}
  for entry in family.rest:
    if entry.path in shapes:
      plan[entry.path] = [Piece(entry, entry.name)]
  for i, (segment, name, index) in enumerate(places(config)):
    for entry in family.layer:
      path = f"{segment}/{name}/{entry.path}"
      if path in shapes:
        layer = {other: shapes[f"{segment}/{name}/{other}"] for other in entry.together}
        span, shape = _span(entry, layer), shapes[path][0 if index is None else 1 :]
        plan.setdefault(path, []).extend(
          Piece(entry, entry.name.format(i=i, e=e), index, e, span) for e in _experts(entry, shape)
        )
  for path in shapes:
    if path not in plan:
      raise ValueError(f"parameter {path!r} has no place in the layout of family {family.name!r}")
  return plan


def _experts(entry: Entry, shape: tuple[int, ...]) -> Sequence[int | None]:
  """The numbers of the experts that a parameter of one layer holds, each a tensor of its own."""
  return range(shape[0]) if EXPERT in entry.name else (None,)


def _span(entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> Span | None:
  """Which part of the last axis of a tensor a parameter is, from the shapes of all in it."""
  if not entry.together:
    return None
  widths = [shapes[path][-1] for path in entry.together]
  which = entry.together.index(entry.path)
  return sum(widths[:which]), sum(widths[: which + 1]), sum(widths)
