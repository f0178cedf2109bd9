"""Loops of a GPU kernel in its machine code, as nvdisasm prints it."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from effjax.kernels.flash_attention.fused.jobs import Job
from effjax.kernels.flash_attention.fused.sizes import Size

# Of matrices, in a tile of each kernel.
PRODUCTS = {"forward": 2, "queries": 3, "keys": 4, "bias": 2}

_LINE = re.compile(r"^(\.L_\w+):|/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", re.MULTILINE)
_BACK = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
_PRODUCT = re.compile(r"\b(HGMMA)\.(\d+)x(\d+)x(\d+)|\b(HMMA)\.16(8)(\d+)")
_FFMA = re.compile(r"\bFFMA2?\b")
_WAIT = re.compile(r"\bDEPBAR\.LE SB0, (0x[0-9a-f]+)")


@dataclasses.dataclass(frozen=True)
class Loop:
  """The instructions of a loop's body, those of one warp, in the order of the code.

  Example:
    >>> body = ("DEPBAR.LE SB0, 0x2", "HMMA.16816.F32.BF16 R0, R4, R8, R0", "MUFU.EX2 R0, R0")
    >>> loop = Loop(body)
    >>> loop.wait, loop.products, loop.multiplied, loop.exponentials
    (2, 1, 2048, 1)
  """

  instructions: tuple[str, ...]

  @property
  def products(self) -> int:
    """Instructions for the tensor cores, or multiplications of numbers where there are none."""
    return len(self._tensor) or self._scalar

  @property
  def multiplied(self) -> int:
    """Pairs of numbers that a warp multiplies; a product of four warps counts as a quarter."""
    return sum(map(_pairs, self._tensor)) or 32 * self._scalar

  @property
  def rest(self) -> int:
    """Instructions that are no product."""
    return len(self.instructions) - self.products

  @property
  def exponentials(self) -> int:
    """Instructions for powers of two."""
    return sum("MUFU.EX2" in each for each in self.instructions)

  @property
  def wait(self) -> int | None:
    """Groups of loads that may be on their way where it waits for the most, None if for none."""
    found = (_WAIT.search(each) for each in self.instructions)
    return min((int(each[1], 16) for each in found if each), default=None)

  @property
  def _tensor(self) -> list[re.Match]:
    return [x for x in map(_PRODUCT.search, self.instructions) if x]

  @property
  def _scalar(self) -> int:
    return sum(_FFMA.search(each) is not None for each in self.instructions)


def loops(text: str) -> list[Loop]:
  """Innermost loops that hold products, in the order of the code."""
  instructions: list[str] = []
  starts: dict[str, int] = {}
  spans = []
  for label, instruction in _lines(text):
    if label:
      starts[label] = len(instructions)
      continue
    instructions.append(instruction)
    back = _BACK.search(instruction)
    if back and starts.get(back[1], len(instructions)) < len(instructions) - 1:
      spans.append((starts[back[1]], len(instructions)))
  bodies = {span: Loop(tuple(instructions[slice(*span)])) for span in sorted(spans)}
  holding = [span for span, loop in bodies.items() if loop.products]
  inside = lambda a, b: a != b and b[0] <= a[0] and a[1] <= b[1]
  return [bodies[span] for span in holding if not any(inside(x, span) for x in holding)]


def figures(code: str, kernel: str, job: Job, size: Size) -> dict[str, Any]:
  """Of the loops over tiles: those without a predicate first, then those with one.

  By name: "wait", the least; of a tile of 128 × 128 and eight warps "rest" and "exponentials", and
  "partial", the rest with a predicate; "useful", what a tile must multiply of what is multiplied;
  "wgmma", whether products are those of Hopper. The bias's kernel has a predicate in every tile.
  """
  kinds = ["rest"] * job.any_full + ["partial"] * job.any_partial
  kinds = ["partial"] if kernel == "bias" else kinds
  found = loops(code)[: len(kinds)]
  if len(found) < len(kinds):
    return {}
  tile = size.queries * size.keys
  scale = size.warps * 128 * 128 / (8 * tile)
  needed = PRODUCTS[kernel] * tile * job.query.shape[-1] / size.warps
  return {
    "wait": min((each.wait for each in found if each.wait is not None), default=None),
    **{kind: round(each.rest * scale) for kind, each in zip(kinds, found, strict=True)},
    "exponentials": round(found[0].exponentials * scale),
    "wgmma": any("HGMMA" in each for each in found[0].instructions),
    "useful": round(needed / found[0].multiplied, 2),
  }


def products(code: str) -> dict[str, Any]:
  """Of a kernel "tensor", see below; "wait", the least of its loops, see `figures`."""
  waits = (loop.wait for loop in loops(code) if loop.wait is not None)
  return {"tensor": tensor(code), "wait": min(waits, default=None)}


def tensor(code: str) -> int:
  """How many instructions there are for tensor cores."""
  return sum(bool(each and _PRODUCT.search(each)) for _, each in _lines(code))


def _lines(text: str) -> Iterator[tuple[str, str]]:
  return ((found[1], found[2]) for found in _LINE.finditer(text))


def _pairs(product: re.Match) -> int:
  """Of a warp: 64 × N × K over four warps, 16 × 8 × K."""
  if product[1]:
    return int(product[2]) * int(product[3]) * int(product[4]) // 4
  return 16 * 8 * int(product[7])
