"""Running a module on a batch, and collecting what its layers sowed on the way."""

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import trees
from effjax.core.trees import path_string
from effjax.core.typing import Array, Key, Params
from effjax.layers.context import Context

RNG_STREAMS = ("dropout", "router", "mask")
FACTS = tuple(field.name for field in dataclasses.fields(Context) if field.name != "tokens")


def forward(
  module: nn.Module,
  params: Params,
  batch: Mapping[str, Array | np.ndarray],
  rng: Key | None = None,
  *,
  read: Iterable[str] = ("targets", "weights"),
  collections: Iterable[str] = ("losses", "metrics", "statistics"),
) -> tuple[Any, Mapping]:
  """The module's output on a batch, and what its layers sowed under `collections`.

  Args:
    module: called with the tokens, and by keyword with whatever else in the batch it reads.
    params: its parameters.
    batch: tokens [B, T], and whatever else.
    rng: key of all randomness in layers and weights; None switches it off.
    read: entries of the batch that the caller reads itself.
    collections: what layers may sow.

  Raises:
    ValueError: for an entry of the batch that neither the caller nor the module reads.

  Example:
    >>> module = nn.Embed(3, 2, embedding_init=nn.initializers.ones)
    >>> forward(module, {"embedding": jnp.ones((3, 2))}, {"tokens": jnp.array([[0]])})[0].tolist()
    [[[1.0, 1.0]]]
  """
  taken = taken_by(module)
  if unread := sorted(set(batch) - taken - {"tokens", *read}):
    raise ValueError(
      f"batch: nobody reads {', '.join(unread)}; allowed for {type(module).__name__}: "
      f"{', '.join(sorted(taken | {'tokens', *read}))}"
    )
  given: dict[str, Any] = {name: batch[name] for name in taken if name in batch}
  first = () if "tokens" in given else (batch["tokens"],)
  if rng is not None:
    keys = jax.random.split(rng, len(RNG_STREAMS))
    given["rngs"] = dict(zip(RNG_STREAMS, keys, strict=True))
    params = trees.drawn(params, rng)
  return module.apply({"params": params}, *first, **given, mutable=list(collections))


def taken_by(module: nn.Module) -> set[str]:
  """The entries of a batch that the module reads: what its `reads` says, or what its call takes."""
  if hasattr(module, "reads"):
    return {"tokens", *module.reads}
  parameters = inspect.signature(type(module).__call__).parameters
  if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
    return set(FACTS)
  return set(parameters) - {"self", "cache"}


def sown_values(sown: Mapping) -> dict[str, Array]:
  """One value for each kind of loss and metric, and every array under "statistics" by its path.

  Losses and metrics are scalars; a kind is averaged over all layers, and all entries of scanned
  ones, that sowed under its name. A statistic is kept as it is: scanned layers stack it.

  Example:
    >>> found = sown_values({
    ...   "metrics": {"a": {"z": (jnp.ones(3),)}, "b": {"z": (jnp.zeros(()),)}},
    ...   "statistics": {"a": {"load": (jnp.ones(2),)}},
    ... })
    >>> float(found["z"]), found["a/load"].tolist()
    (0.75, [1.0, 1.0])
  """
  statistics = dict(_named(sown.get("statistics", {})))
  return statistics | layer_means(sown.get("metrics", {})) | layer_means(sown.get("losses", {}))


def layer_means(sown: Mapping) -> dict[str, Array]:
  """Name → mean over all layers, and all entries of scanned ones, that sowed under that name.

  Example:
    >>> layer_means({"a": {"z": (jnp.ones(3),)}, "b": {"z": (jnp.zeros(()),)}})
    {'z': Array(0.75, dtype=float32)}
  """
  found: dict[str, list[Array]] = {}
  for path, leaf in _named(sown):
    found.setdefault(path.rsplit("/", 1)[-1], []).append(leaf.astype(jnp.float32).reshape(-1))
  return {name: jnp.concatenate(leaves).mean() for name, leaves in found.items()}


def _named(sown: Mapping) -> list[tuple[str, Array]]:
  """(path of the layer and the name, value) of everything that was sown."""
  leaves = jax.tree_util.tree_leaves_with_path(sown)
  names = lambda path: [key for key in path if isinstance(key, jax.tree_util.DictKey)]
  return [(path_string(names(path)), leaf) for path, leaf in leaves]
