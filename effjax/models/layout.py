"""Where each of our parameters lies in a family's layout."""

import dataclasses
from collections.abc import Mapping

from effjax.core import trees
from effjax.core.typing import PyTree
from effjax.layers.spec import TransformerConfig
from effjax.layers.stack import places
from effjax.models.families.table import Entry, Family, Span


@dataclasses.dataclass(frozen=True)
class Piece:
  """One tensor of one parameter: `index` in its stack, or None when it is not stacked.

  `span` says which part of the tensor it is, see `Entry`.
  """

  entry: Entry
  tensor: str
  index: int | None
  span: Span | None = None


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
      plan[entry.path] = [Piece(entry, entry.name, None)]
  for i, (segment, name, index) in enumerate(places(config)):
    for entry in family.layer:
      path = f"{segment}/{name}/{entry.path}"
      if path in shapes:
        layer = {other: shapes[f"{segment}/{name}/{other}"] for other in entry.together}
        span = _span(entry, layer)
        piece = Piece(entry, entry.name.format(i=i), index, span)
        plan.setdefault(path, []).append(piece)
  for path in shapes:
    if path not in plan:
      raise ValueError(f"parameter {path!r} has no place in the layout of family {family.name!r}")
  return plan


def _span(entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> Span | None:
  """Which part of the last axis of a tensor a parameter is, from the shapes of all in it."""
  if not entry.together:
    return None
  widths = [shapes[path][-1] for path in entry.together]
  which = entry.together.index(entry.path)
  return sum(widths[:which]), sum(widths[: which + 1]), sum(widths)
