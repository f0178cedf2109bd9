"""LoRA: a frozen matrix plus a trained low-rank one (Hu et al., arXiv 2106.09685).

rsLoRA, the scale α/√r: Kalajdzievski, arXiv 2312.03732. The base may be any weight representation;
over a quantised one this is QLoRA (Dettmers et al., arXiv 2305.14314), with nothing added.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from effjax.core import trees
from effjax.core.known import number
from effjax.core.trees import Chooser
from effjax.core.typing import Array, Key, Number, PyTree, Scalar, Size
from effjax.core.weights import Weight
from effjax.peft.beside import is_adapter, naming
from effjax.peft.combine import combine
from effjax.peft.dora import DoRA
from effjax.peft.low_rank import LoRA
from effjax.peft.merging import merge, unmerge
from effjax.peft.starts import LoftQ, PiSSA, Start, default, start_of

__all__ = [
  "DoRA",
  "LoRA",
  "LoftQ",
  "PiSSA",
  "add",
  "combine",
  "init",
  "merge",
  "rebase",
  "unmerge",
]
TARGETS = r"mixer/(query|value)/kernel$"


def add(
  params: PyTree,
  key: Key,
  *,
  rank: Size | Mapping[str, Size] = 8,
  alpha: Scalar | Mapping[str, Scalar] = 16,
  targets: Chooser = TARGETS,
  exclude: Chooser | None = None,
  rs: bool = False,
  dropout: Number = 0.0,
  dora: bool = False,
  start: str | Start = "default",
) -> PyTree:
  """`params` with a `LoRA` over each targeted matrix; the model computes the same as before.

  Each path draws from its own key, whatever else is targeted. Shapes suffice (`jax.eval_shape`).

  Args:
    params: a parameter tree; matrices are [..., D, F], with leading axes for layers or experts,
      each of which gets factors of its own.
    key: PRNG key of what is random at the start.
    rank: r, 1 … min(D, F); or pattern → r, of which the first that is in a path counts, so that a
      last one "" is for all the others. Layers that are scanned together have one path, and a rank
      in common.
    alpha: α, which scales the product by α/r; or pattern → α.
    targets: pattern or predicate on paths; by default the query and value projections.
    exclude: pattern or predicate of targets to leave out.
    rs: scale by α/√r.
    dropout: the rate at which a step of training drops each number that A is multiplied with.
    dora: train the length of each column too (`DoRA`).
    start: "default", one factor random and the other 0; "pissa", the principal part of the matrix,
      of which the base is what is left; `PiSSA(represent)` and `LoftQ(represent, steps)`, by which
      that is quantised; or a function as `starts` has them.

  Raises:
    ValueError: when nothing matches, nothing of it is a matrix, or one is adapted already; for a
      rank, an α or a dropout out of range; for a pattern of rank, α or `exclude` that no target
      matches, and a target that none does; for an unknown start, and one that cannot be over
      what is there.

  Example:
    >>> import jax
    >>> params = {"mixer": {"query": {"kernel": jnp.ones((4, 6))}, "out": {"kernel": jnp.eye(6)}}}
    >>> adapted = add(params, jax.random.key(0), rank=2)
    >>> w = adapted["mixer"]["query"]["kernel"]
    >>> w.a.shape, w.b.shape, float(w.scale[0, 0]), w.parameters
    ((4, 2), (2, 6), 8.0, 44)
    >>> ranks = {"out": 1, "": 2}
    >>> adapted = add(params, jax.random.key(0), rank=ranks, targets="kernel", dora=True)
    >>> adapted["mixer"]["query"]["kernel"].rank, adapted["mixer"]["out"]["kernel"]
    (2, DoRA[6, 6] float32)
  """
  found = trees.matrices(params, targets, exclude)
  ranks, alphas = of_paths("rank", rank, found), of_paths("alpha", alpha, found)
  make, dropout = start_of(start), number("dropout", dropout, least=0, below=1)
  for path, leaf in found.items():
    _check(path, leaf, ranks[path])

  def change(path: str, w: Any) -> LoRA:
    r, scale = ranks[path], number("alpha", alphas[path]) / ranks[path] ** (0.5 if rs else 1)
    with naming(path):
      base, a, b = make(path, w, trees.path_key(key, path), r, scale)
      adapted = _over(base, a, b, scale, dropout)
    return DoRA.over(adapted) if dora else adapted

  return trees.update(params, lambda path, leaf: path in found, change)


def init(base: Array | Weight, key: Key, *, rank: Size, scale: Scalar) -> LoRA:
  """A `LoRA` over the matrix `base` that changes nothing yet.

  Raises:
    ValueError: for a base that is no matrix [..., D, F], and for a rank or a scale out of range.
  """
  if len(base.shape) < 2:
    raise ValueError(f"base {tuple(base.shape)}; allowed: a matrix [..., D, F]")
  _check_rank("base", base, rank)
  scale = number("scale", scale)
  return _over(*default("", base, key, rank, scale), scale)


def rebase(params: PyTree, started: PyTree, original: PyTree) -> PyTree:
  """The same model as factors over `original`: W + s·([A, A₀] [B; −B₀]), of twice the rank.

  So what began with PiSSA can be stored without the base that it was trained over.

  Args:
    params: trained factors over bases that have not changed.
    started: what they were at the start, as `add` gave it.
    original: what `started` computes as: the matrices that `add` was given.

  Raises:
    ValueError: when `params` has no LoRA, or the others have nothing that fits one in its place.

  Example:
    >>> import jax
    >>> original = {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
    >>> started = add(original, jax.random.key(0), rank=1, targets="kernel", start="pissa")
    >>> w = rebase(started, started, original)["kernel"]
    >>> w.rank, w.materialize().tolist()
    (2, [[3.0, 0.0], [0.0, 1.0]])
  """
  first, bases = trees.items(started), trees.items(original)
  chosen = {path: leaf for path, leaf in trees.items(params).items() if isinstance(leaf, LoRA)}
  if not chosen:
    raise ValueError("params has no LoRA; allowed: what lora.add returns")

  def change(path: str, w: LoRA) -> LoRA:
    before, base = first.get(path), bases.get(path)
    if not isinstance(before, LoRA) or before.a.shape != w.a.shape or before.shape != w.shape:
      raise ValueError(f"started has {before!r} at {path}; allowed: what {w!r} was at the start")
    if base is None or is_adapter(base) or tuple(base.shape) != w.shape:
      raise ValueError(f"original has no matrix {w.shape} at {path}")
    a, b = jnp.concatenate([w.a, before.a], -1), jnp.concatenate([w.b, -before.b], -2)
    return dataclasses.replace(w, base=base, a=a, b=b)

  return trees.update(params, lambda path, leaf: path in chosen, change)


def of_paths(name: str, given: Any, paths: Iterable[str]) -> dict[str, Any]:
  """Path → value: `given` itself, or that of its first pattern that is in the path.

  Raises:
    ValueError: for a pattern that is in no path, and a path that no pattern is in.

  Example:
    >>> of_paths("rank", {"query": 4, "": 8}, ["query/kernel", "out/kernel"])
    {'query/kernel': 4, 'out/kernel': 8}
  """
  paths = list(paths)
  if not isinstance(given, Mapping):
    return dict.fromkeys(paths, given)
  for pattern in given:
    if not any(re.search(pattern, path) for path in paths):
      raise ValueError(
        f"{name}: pattern {pattern!r} is in none of the targets {trees.some(paths)}; allowed: ones "
        "that are (layers that are scanned together have one path; stack.unscan takes them apart)"
      )

  def first(path: str) -> Any:
    for pattern, value in given.items():
      if re.search(pattern, path):
        return value
    allowed = 'one for each target, as a last "" is'
    raise ValueError(f"{name}: none of the patterns {list(given)} is in {path}; allowed: {allowed}")

  return {path: first(path) for path in paths}


def _over(base: Any, a: Array, b: Array, scale: Scalar, dropout: float = 0.0) -> LoRA:
  scales = jnp.full((*base.shape[:-2], 1, 1), scale, jnp.float32)
  return LoRA(base, a, b, scales, dropout=dropout)


def _check(path: str, leaf: Array | Weight, rank: Size) -> None:
  if is_adapter(leaf):
    raise ValueError(
      f"{path} has a {type(leaf).__name__} already; merge or remove it first, or exclude it"
    )
  _check_rank(path, leaf, rank)


def _check_rank(path: str, leaf: Array | Weight, rank: Size) -> None:
  allowed = min(leaf.shape[-2:])
  if not 1 <= number("rank", rank, integer=True) <= allowed:
    raise ValueError(f"rank {rank} for {path} {tuple(leaf.shape)}; allowed: 1 … {allowed}")
