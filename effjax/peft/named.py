"""Named adapters over one matrix, of which one, a mixture or one for each row of a batch is used.

params = named.join({"fr": french, "de": german})
generate(module, named.use(params, ["fr", "de", None]), prompts, max_new_tokens=32)
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from effjax.core import trees
from effjax.core.known import number
from effjax.core.typing import Array, Float, PyTree, Scalar
from effjax.peft.detached import detach
from effjax.peft.members import family, is_same
from effjax.peft.mixture import Named

__all__ = ["Named", "add", "join", "names", "remove", "take", "use"]
Choice = str | Mapping[str, Scalar] | None


def join(adapters: Mapping[str, PyTree], base: PyTree = None) -> PyTree:
  """A tree with several adapters by name, none of which is used yet (`use`).

  Args:
    adapters: name → a tree with LoRA or DoRA over the same base, or what `detach` takes off one.
      They may be over different matrices, and of any ranks.
    base: what they are put over; None is the base of the first.

  Raises:
    ValueError: as `add`, and for no adapter at all.

  Example:
    >>> import jax
    >>> from effjax.peft import lora
    >>> base = {"kernel": jnp.ones((3, 4))}
    >>> adapted = lambda i: lora.add(base, jax.random.key(i), rank=i, targets="kernel")
    >>> params = join({"fr": adapted(1), "de": adapted(2)})
    >>> names(params), params["kernel"]
    (('de', 'fr'), Named[3, 4] float32)
  """
  if not adapters:
    raise ValueError("adapters: none; allowed: at least one, by name")
  params = detach(next(iter(adapters.values())))[0] if base is None else base
  for name, each in adapters.items():
    params = add(params, name, each)
  return params


def add(params: PyTree, name: str, adapters: PyTree) -> PyTree:
  """`params` with one more named adapter, which is not used yet.

  Args:
    params: a tree with or without named adapters. Where it has another adapter, such as a LoRA that
      is for all, that is part of the base and trains too.
    name: what it is called; not empty, and without "/".
    adapters: a tree with LoRA or DoRA, over the base that `params` has, or what `detach` takes off.

  Raises:
    ValueError: for a name that is there already or is none; where the adapters are of another kind,
      several at a path, over another base, or do not fit it.

  Example:
    >>> import jax
    >>> from effjax.peft import lora
    >>> base = {"kernel": jnp.ones((3, 4))}
    >>> params = add(base, "it", lora.add(base, jax.random.key(0), rank=2, targets="kernel"))
    >>> bool((remove(params, "it")["kernel"] == base["kernel"]).all())
    True
  """
  if not isinstance(name, str) or not name or "/" in name:
    raise ValueError(f"name={name!r}; allowed: a text that is not empty and has no '/'")
  leaves = trees.items(params)
  if name in _names(leaves):
    raise ValueError(f"name={name!r} is there already; allowed: another, or to remove it first")
  found = family(repr(name), adapters)
  for path in found:
    if path not in leaves:
      raise ValueError(f"adapters: params has nothing at {path!r}; allowed: {trees.some(leaves)}")

  def change(path: str, leaf: Any) -> Named:
    member = found[path]
    here = leaf if isinstance(leaf, Named) else Named.over(leaf)
    if member.base is not None and not is_same(member.base, here.base):
      raise ValueError(
        f"adapters: {path!r} is over another base; allowed: that of params, or what detach gives"
      )
    try:
      return here.with_member(name, member)
    except ValueError as error:
      raise ValueError(f"adapters: {path!r} {tuple(leaf.shape)}: {error}") from error

  return trees.update(params, lambda path, leaf: path in found, change)


def remove(params: PyTree, name: str) -> PyTree:
  """`params` as if the adapter had never been there, to the bit; rows that used it use none.

  Raises:
    ValueError: for a name that there is none of.
  """
  return _of_named(params, name, lambda leaf: leaf.without(name) if name in leaf.names else leaf)


def take(params: PyTree, name: str) -> PyTree:
  """The tree with one of the adapters alone, as the plain LoRA or DoRA that it is.

  Raises:
    ValueError: for a name that there is none of.

  Example:
    >>> import jax
    >>> from effjax.peft import lora
    >>> base = {"kernel": jnp.ones((3, 4))}
    >>> params = join({"fr": lora.add(base, jax.random.key(0), rank=2, targets="kernel")})
    >>> take(params, "fr")["kernel"]
    LoRA[3, 4] float32
  """
  return _of_named(
    params, name, lambda leaf: leaf.member(name) if name in leaf.names else leaf.base
  )


def names(params: PyTree) -> tuple[str, ...]:
  """What the adapters in `params` are called, in alphabetical order.

  Raises:
    ValueError: when there is none.
  """
  found = _names(trees.items(params))
  if not found:
    raise ValueError("params has no named adapter; allowed: what named.join or named.add gives")
  return found


def use(
  params: PyTree,
  which: Choice
  | Sequence[Choice]
  | Float[Array | np.ndarray, "n"]
  | Float[Array | np.ndarray, "B n"],
) -> PyTree:
  """`params` that compute with one adapter, with a weighted sum of them, or with one for each row.

  Rows and arrays are values: others run in the same program. A name or a mapping, which holds for
  all rows, also says what trains: what it names and no other, where all train otherwise. That is
  another program.

  Args:
    params: a tree with named adapters.
    which: a name; name → weight; None, the base; or for each row of a batch one of these, the first
      axis of what is computed with being the batch's. Or an array of weights in the order of
      `names`, [n] or for each row [B, n], which can be learned.

  Raises:
    ValueError: for a name that there is none of, and for weights that are no finite numbers or not
      one for each adapter.

  Example:
    >>> from effjax.core import linear
    >>> from effjax.peft import LoRA
    >>> factors = lambda x: {"w": LoRA(None, jnp.eye(2), x * jnp.eye(2), jnp.ones((1, 1)))}
    >>> params = join({"fr": factors(2.0), "de": factors(3.0)}, {"w": jnp.eye(2)})
    >>> linear(jnp.ones((3, 2)), use(params, ["fr", None, {"de": 0.5}])["w"])[:, 0].tolist()
    [3.0, 1.0, 2.5]
    >>> linear(jnp.ones((1, 2)), use(params, jnp.array([1.0, 2.0]))["w"]).tolist()
    [[8.0, 8.0]]
  """
  every = names(params)
  mix, chosen = _mixture(which, every)
  given = {which: 1} if isinstance(which, str) else which
  training = tuple(sorted(given)) if isinstance(given, Mapping) and given else None

  def change(path: str, leaf: Named) -> Named:
    own = np.array([every.index(name) for name in leaf.names])
    spread = lambda x: jnp.broadcast_to(x[..., own], (*leaf.shape[:-2], *x.shape[:-1], len(own)))
    return dataclasses.replace(leaf, mix=spread(mix), chosen=spread(chosen), training=training)

  return trees.update(params, lambda path, leaf: isinstance(leaf, Named), change)


def _mixture(which: Any, every: tuple[str, ...]) -> tuple[Array, Array]:
  """Weights of all adapters and which are chosen, [n] or [B, n]."""
  if hasattr(which, "dtype"):
    shape = tuple(which.shape)
    if shape[-1:] != (len(every),) or len(shape) > 2 or 0 in shape:
      raise ValueError(f"which: {shape}; allowed: [n] or [B, n], n = {len(every)} for {every}")
    mix = jnp.asarray(number("which", which, shape=shape), jnp.float32)
    return mix, jnp.ones(shape, bool)
  by_row = isinstance(which, Sequence) and not isinstance(which, str)
  if by_row and not which:
    raise ValueError("which: no rows; allowed: a name or None for each row of a batch")
  rows = [_row(each, every) for each in (which if by_row else [which])]
  mix = jnp.array([[row.get(name, 0.0) for name in every] for row in rows], jnp.float32)
  chosen = jnp.array([[name in row for name in every] for row in rows])
  return (mix, chosen) if by_row else (mix[0], chosen[0])


def _row(which: Any, every: tuple[str, ...]) -> dict[str, Any]:
  """Name → weight of one choice."""
  if which is None:
    return {}
  if not isinstance(which, str | Mapping):
    raise ValueError(f"which: {which!r}; allowed: a name, name → weight, None, or those by row")
  row = {which: 1.0} if isinstance(which, str) else which
  for name in row:
    if name not in every:
      raise ValueError(f"which: {name!r}; allowed: {', '.join(every)}, or None")
  return {name: number(f"which: {name}", weight) for name, weight in row.items()}


def _of_named(params: PyTree, name: str, change: Callable[[Named], Any]) -> PyTree:
  """`params` with change(leaf) for each `Named`."""
  every = names(params)
  if name not in every:
    raise ValueError(f"name={name!r}; allowed: {', '.join(every)}")
  return trees.update(params, lambda _, leaf: isinstance(leaf, Named), lambda _, leaf: change(leaf))


def _names(leaves: Mapping[str, Any]) -> tuple[str, ...]:
  found = [leaf.names for leaf in leaves.values() if isinstance(leaf, Named)]
  return tuple(sorted({name for each in found for name in each}))
