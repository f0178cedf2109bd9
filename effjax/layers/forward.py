"""Running a module on a batch, and collecting what its layers sowed on the way."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax.core.typing import Array, Key, Params

RNG_STREAMS = ("dropout", "router", "mask")


def forward(
  module: nn.Module,
  params: Params,
  batch: Mapping[str, Array],
  rng: Key | None = None,
  *,
  collections: Sequence[str] = ("losses", "metrics"),
) -> tuple[Any, Mapping]:
  """The module's output on a batch, and what its layers sowed under `collections`.

  Args:
    module: called with the tokens, and with segment_ids and positions where the batch holds them.
    params: its parameters.
    batch: tokens [B, T], and whatever else.
    rng: key of all randomness in layers; None switches it off.
    collections: what layers may sow.

  Example:
    >>> module = nn.Embed(3, 2, embedding_init=nn.initializers.ones)
    >>> forward(module, {"embedding": jnp.ones((3, 2))}, {"tokens": jnp.array([[0]])})[0].tolist()
    [[[1.0, 1.0]]]
  """
  given = {name: batch[name] for name in ("segment_ids", "positions") if name in batch}
  rngs = {} if rng is None else dict(zip(RNG_STREAMS, jax.random.split(rng, 3), strict=True))
  mutable = list(collections)
  return module.apply({"params": params}, batch["tokens"], **given, rngs=rngs, mutable=mutable)


def layer_means(sown: Mapping) -> dict[str, Array]:
  """Name → mean over all layers, and all entries of scanned ones, that sowed under that name.

  Example:
    >>> layer_means({"a": {"z": (jnp.ones(3),)}, "b": {"z": (jnp.zeros(()),)}})
    {'z': Array(0.75, dtype=float32)}
  """
  found: dict[str, list[Array]] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(sown):
    name = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)][-1]
    found.setdefault(name, []).append(leaf.astype(jnp.float32).reshape(-1))
  return {name: jnp.concatenate(leaves).mean() for name, leaves in found.items()}
