"""LoRA: a frozen matrix plus a trained low-rank one (Hu et al., arXiv 2106.09685).

rsLoRA, the scale α/√r: Kalajdzievski, arXiv 2312.03732. The base may be any weight representation;
over a quantised one this is QLoRA (Dettmers et al., arXiv 2305.14314), with nothing added.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from effjax.core import trees
from effjax.core.known import number
from effjax.core.trees import Chooser
from effjax.core.typing import Array, Key, Number, PyTree, Scalar, Size
from effjax.core.weights import Weight, entries, is_weight, materialize, offset
from effjax.peft.beside import is_adapter
from effjax.peft.combine import combine
from effjax.peft.dora import DoRA
from effjax.peft.low_rank import LoRA
from effjax.peft.starts import LoftQ, PiSSA, Represent, Start, check_represent, default, start_of

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
    with _naming(path):
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


def merge(params: PyTree, represent: Represent | None = None) -> PyTree:
  """`params` with the matrix that each adapter computes with in its place, such as W0 + s·A B.

  The bias beside a matrix whose outputs an adapter multiplies whole (IA³) is multiplied too.

  Args:
    params: a tree with adapters of any kind that stand over something.
    represent: (path, matrix) → what stands for a matrix whose base was quantised, as
      `NF4.represent`; None leaves the array.

  Raises:
    ValueError: when there is no adapter in `params`, one is new in the model and stands over
      nothing, as a prefix, has rows that its matrix has not, as a soft prompt, or is no single
      matrix; for a `represent` that is no function.

  Example:
    >>> import jax
    >>> adapted = add({"kernel": jnp.eye(2)}, jax.random.key(0), rank=1, targets="kernel")
    >>> merge(adapted)["kernel"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
  """
  check_represent(represent)
  chosen = _adapters(params)
  beside = _biases(chosen)

  def change(path: str, leaf: Any) -> Any:
    if path not in chosen:
      return offset(beside[path], leaf)
    with _naming(path):
      base, matrix = _innermost(leaf), leaf.materialize()
      plain = represent(path, matrix) if represent and is_weight(base) else matrix
    return offset(beside.get(path), plain)

  return trees.update(params, lambda path, leaf: path in chosen or path in beside, change)


def unmerge(merged: PyTree, adapted: PyTree) -> PyTree:
  """The inverse of `merge`: the adapters of `adapted`, over what makes the matrices of `merged`.

  A number that is what `merge` gave comes back as that of the base, to the bit; one that has been
  changed since, as the difference, W − s·A B, within a rounding of the larger of both. A quantised
  base comes back as the array that it stood for.

  Args:
    merged: what `merge` gave, possibly changed since.
    adapted: the tree that was merged.

  Raises:
    ValueError: when `adapted` has no adapter, `merged` no array of that shape in its place, or one
      cannot be taken out of it again.
  """
  chosen, plain, leaves = _adapters(adapted), trees.items(merged), trees.items(adapted)
  beside = {path: leaf for path, leaf in _biases(chosen).items() if path in leaves}
  for path, leaf in chosen.items():
    if path not in plain or tuple(plain[path].shape) != leaf.shape or is_weight(plain[path]):
      raise ValueError(f"merged has no plain matrix {leaf.shape} at {path}")

  def change(path: str, w: Array) -> Any:
    if path in beside:
      w = _bias_that_makes(beside[path], materialize(leaves[path]), w)
    if path not in chosen:
      return w
    with _naming(path):
      _innermost(chosen[path])
      return _over_what_makes(chosen[path], w)

  return trees.update(merged, lambda path, leaf: path in chosen or path in beside, change)


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


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
  """ValueErrors say that they are about what is at `path`."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _adapters(params: PyTree) -> dict[str, Any]:
  """Path → adapter.

  Raises:
    ValueError: when there is none.
  """
  found = {path: leaf for path, leaf in trees.items(params).items() if is_adapter(leaf)}
  if not found:
    raise ValueError("params has no adapter; allowed: what lora.add returns")
  return found


def _innermost(leaf: Any) -> Any:
  """What is under an adapter and those that it stands over.

  Raises:
    ValueError: when that is nothing, or one of them is more than a matrix.
  """
  if leaf is None:
    raise ValueError(
      "is new in the model, with nothing under it to be merged into; allowed: adapters that stand "
      "over a matrix, such as LoRA"
    )
  if len(leaf.shape) > 1 and entries(leaf) != leaf.shape[0]:
    raise ValueError(
      f"{leaf!r} has rows that its matrix has no place for; allowed: to take them off before, as "
      "soft_prompt.remove does"
    )
  return _innermost(leaf.base) if is_adapter(leaf) else leaf


def _biases(adapters: Mapping[str, Any]) -> dict[str, Any]:
  """Where the bias beside an adapter would be → the adapter."""
  kernels = {path: leaf for path, leaf in adapters.items() if path.endswith("kernel")}
  return {path.removesuffix("kernel") + "bias": leaf for path, leaf in kernels.items()}


def _bias_that_makes(w: Any, bias: Array, merged: Array) -> Array:
  """What the product with w adds `merged` for: `bias` where that is so."""
  factor = offset(w, jnp.ones_like(bias))
  return jnp.where(merged == offset(w, bias), bias, merged / jnp.where(factor == 0, 1, factor))


def _over_what_makes(leaf: Any, w: Array) -> Any:
  """An adapter over the array that it makes w of, in place of its base."""
  base = jnp.where(w == leaf.materialize(), materialize(leaf.base), leaf.beneath(w))
  under = _over_what_makes(leaf.base, base) if is_adapter(leaf.base) else base
  return dataclasses.replace(leaf, base=under)


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
