"""What a module of attention sees of its trained prefix (arXiv 2101.00190).

The module has a field `prefix`, a `TrainedPrefix` or None, and parameters "prefix_key" and
"prefix_value" [P, K, H]; "module_key" and "module_value" [A, P, K, H] with modules.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from effjax.attention import parts
from effjax.attention.attend import attend
from effjax.core.typing import Array, Float
from effjax.core.weights import materialize
from effjax.layers import Context, weight
from effjax.layers.prefix import INIT, TrainedPrefix


def check(mixer: Any, takes: bool) -> None:
  """Raises ValueError where there is a prefix and it cannot have one.

  Args:
    mixer: the module.
    takes: whether its class can have one.
  """
  prefix, name = mixer.prefix, type(mixer).__name__
  if prefix is None:
    return
  if not takes:
    raise ValueError(f"{name}: prefix={prefix}; allowed: None")
  if not mixer.cross and not mixer.mask.relative:
    raise ValueError(
      f"{name}: prefix={prefix} with mask={mixer.mask}; allowed: masks of distances, which alone "
      "say who sees what stands before the first token"
    )
  if mixer.scores is not None and not mixer.scores.relative:
    raise ValueError(
      f"{name}: prefix={prefix} with scores of {type(mixer.scores).__name__}; allowed: functions "
      "of distances"
    )


def check_unread(mixer: Any) -> None:
  """Raises ValueError for a prefix among the parameters that nothing would read."""
  prefix: TrainedPrefix | None = mixer.prefix
  modules = prefix is not None and prefix.modules > 0
  for name, read in {"prefix_key": prefix is not None, "module_key": modules}.items():
    if not read and mixer.has_variable("params", name):
      where = "/".join(mixer.path) or type(mixer).__name__
      raise ValueError(
        f"params: {where} has {name}, which prefix={prefix} does not read; allowed: the "
        "configuration that belongs to them, as prefix.add gives both"
      )


def joined(
  mixer: Any,
  tokens: Callable[..., Any],
  query: Float[Array, "B T N H"],
  positions: Array,
  context: Context,
  **arguments: Any,
) -> Float[Array, "B T N H"]:
  """What `tokens(return_lse=…)` attends to, joined with what is seen of the prefix.

  Args:
    mixer: the module, in its call.
    tokens: the attention of the queries over tokens.
    query, positions, context: as in the module.
    **arguments: of `attend`.
  """
  prefix: TrainedPrefix | None = mixer.prefix
  if prefix is None:
    return tokens(return_lse=False)
  key, value = (_of_rows(mixer, prefix, name, query, context) for name in ("key", "value"))
  if not mixer.cross and not (mixer.scores is None and mixer.mask.sees_all_before):
    arguments |= {"mask": mixer.mask, "query_positions": prefix.length + positions}
  part = attend(query, key, value, return_lse=True, **arguments)
  return parts.join(tokens(return_lse=True), part)[0]


def mean_keys(mixer: Any, length: int, queries: int | None) -> float:
  """Keys of the prefix that one of the last `queries` tokens sees, on average."""
  prefix: TrainedPrefix | None = mixer.prefix
  if prefix is None or mixer.cross:
    return 0.0 if prefix is None else float(prefix.length)
  queries = length if queries is None else queries
  whole = mixer.mask.mean_keys(prefix.length + length, queries)
  return whole - mixer.mask.mean_keys(length, queries)


def _of_rows(
  mixer: Any, prefix: TrainedPrefix, name: str, query: Array, context: Context
) -> Float[Array, "B P K H"]:
  """Keys or values of the prefix in the type of `query`, those of each row."""
  shape = (prefix.length, mixer.units["kv_heads"], query.shape[-1])
  general = materialize(weight(mixer, f"prefix_{name}", INIT, shape))
  modules = None
  if count := prefix.modules:
    zeros = nn.initializers.zeros
    modules = materialize(weight(mixer, f"module_{name}", zeros, (count, *shape)))
  found = prefix.composed(general, modules, context.attributes)
  return jnp.broadcast_to(found, (query.shape[0], *shape)).astype(query.dtype)
