"""A prefix in one array, as it is exchanged, and what computes it while it trains."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from effjax.core import trees
from effjax.core.known import number
from effjax.core.typing import Array, Float, Key, Params, PyTree, Size
from effjax.core.weights import linear
from effjax.layers import stack
from effjax.layers.linear import KERNEL_INIT
from effjax.layers.spec import TransformerConfig, ask
from effjax.peft.beside import Tuned
from effjax.peft.prefix.layers import of, prefix_of


def flat(config: TransformerConfig, params: Params) -> Float[Array, "P N"]:
  """The general prefix in one array: for each layer its keys, then its values, [K, H] each.

  Raises:
    ValueError: when no layer has one.
  """
  leaves, P = trees.items(params), of(config).length
  parts = []
  for path, index, _ in _places(config, params):
    value = leaves[path].value
    parts.append((value if index is None else value[index]).reshape(P, -1))
  return jnp.concatenate(parts, axis=1)


def put(config: TransformerConfig, params: Params, values: Float[Array, "P N"]) -> dict:
  """`params` with `values` as the general prefix: the inverse of `flat`.

  Raises:
    ValueError: for another shape than that of `flat`, and when no layer has a prefix.
  """
  prefix, places = of(config), _places(config, params)
  sizes = [math.prod(shape) for *_, shape in places]
  if tuple(values.shape) != (prefix.length, sum(sizes)):
    allowed = (prefix.length, sum(sizes))
    raise ValueError(f"values: shape {tuple(values.shape)}; allowed: {allowed}")
  pieces: dict[str, list[Array]] = {}
  parts = jnp.split(values, np.cumsum(sizes)[:-1].tolist(), axis=1)
  for (path, _, shape), part in zip(places, parts, strict=True):
    pieces.setdefault(path, []).append(part.reshape(prefix.length, *shape))
  scanned = {path for path, index, _ in places if index is not None}
  whole = lambda path: jnp.stack(pieces[path]) if path in scanned else pieces[path][0]
  at = lambda path, leaf: path in pieces
  return trees.update(params, at, lambda path, leaf: Tuned(None, whole(path)))


def reparametrize(
  config: TransformerConfig,
  params: Params,
  key: Key,
  *,
  width: Size | None = None,
  hidden: Size | None = None,
) -> tuple[dict, Callable[[PyTree], dict]]:
  """What trains in place of a prefix, and the view that makes `params` of it.

  The prefix is tanh(E W_1 + b_1) W_2 + b_2, laid out as `flat`: E is N(0, 1), the rest as in
  `layers.Linear`. The view of what was trained is what remains, and the rest is dropped.

  Args:
    config, params: a model with a prefix.
    key: PRNG key.
    width: of E [P, width]; None means the width of a layer's keys.
    hidden: hidden units; None means the model's width.

  Returns:
    A tree {"embedding", "up", "down"}, and a function for `layers.objective.through`.

  Example:
    >>> from effjax.models import Transformer, presets
    >>> from effjax.peft.prefix import add
    >>> params = Transformer(presets.TINY).init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> config, params = add(presets.TINY, params, jax.random.key(1), length=5)
    >>> trained, view = reparametrize(config, params, jax.random.key(2), hidden=8)
    >>> trained["embedding"].shape, trained["up"]["kernel"].shape, flat(config, view(trained)).shape
    ((5, 32), (32, 8), (5, 128))

  Reference: arXiv 2101.00190, section 4.3; two layers, as in Hugging Face's peft.
  """
  prefix, shapes = of(config), [shape for *_, shape in _places(config, params)]
  sizes = {
    "width": math.prod(shapes[0]) if width is None else width,
    "hidden": config.width if hidden is None else hidden,
  }
  E, H = (number(name, n, integer=True, least=1) for name, n in sizes.items())
  trained: dict[str, PyTree] = {}
  trained["embedding"] = jax.random.normal(trees.path_key(key, "embedding"), (prefix.length, E))
  for name, D, F in (("up", E, H), ("down", H, sum(map(math.prod, shapes)))):
    kernel = KERNEL_INIT(trees.path_key(key, name), (D, F), jnp.float32)
    trained[name] = {"kernel": kernel, "bias": jnp.zeros(F)}
  return trained, Partial(functools.partial(_reparametrized, config), params)


def _reparametrized(config: TransformerConfig, params: Params, trained: PyTree) -> dict:
  up, down = trained["up"], trained["down"]
  hidden = jnp.tanh(linear(trained["embedding"], up["kernel"], up["bias"]))
  return put(config, params, linear(hidden, down["kernel"], down["bias"]))


def _places(
  config: TransformerConfig, params: Params
) -> list[tuple[str, int | None, tuple[int, int]]]:
  """Path, index in the stack and shape [K, H] of keys, then values, of each layer's prefix.

  Raises:
    ValueError: when `params` has none there.
  """
  places = [
    (
      f"{segment}/{name}/mixer/prefix_{part}",
      index,
      ask(spec.mixer, "kv_shape", name)(config.width),
    )
    for (segment, name, index), spec in zip(stack.places(config), config.layers, strict=True)
    if prefix_of(spec) is not None
    for part in ("key", "value")
  ]
  if missing := sorted({path for path, *_ in places} - {*trees.items(params)}):
    raise ValueError(f"params: has no {trees.some(missing)}; allowed: what prefix.add returns")
  return places
