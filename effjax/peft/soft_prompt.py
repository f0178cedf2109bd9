"""Soft prompts: trained embeddings of virtual tokens, the model frozen (arXiv 2104.08691).

Virtual tokens have ids of their own, V … V + M·P − 1 after the V of the vocabulary, which the table
of embeddings knows: wherever tokens go, they go, and `prepend` puts them there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import trees, weights
from effjax.core.known import check_ids, number
from effjax.core.register import register
from effjax.core.typing import Array, Float, Int, Key, Params, PyTree, Size
from effjax.core.weights import Over, Weight
from effjax.layers.spec import TransformerConfig
from effjax.peft.virtual import widened

PATH = "embed/embedding"
Given = TypeVar("Given")


@register(trains=("prompt",), kind="adapter")
class Prompted(Over):
  """A table of embeddings W [V, D] that has rows for the virtual tokens of M prompts too.

  It is W in products, its transpose (a tied head's logits are [V]) and its shape; only looking up
  ids V + m·P + j gives prompt[m, j] / scale.

  Invariants:
    base: W, an array or `Weight` [..., V, D].
    prompt: [..., M, P, D] float32, as it goes into the model.
    scale: [..., 1, 1], by which the model multiplies embeddings.
  """

  prompt: PyTree
  scale: PyTree

  @property
  def parameters(self) -> int:
    return super().parameters + math.prod(self.prompt.shape)

  @property
  def entries(self) -> int:
    return self.shape[-2] + math.prod(self.prompt.shape[-3:-1])

  def check(self) -> None:
    if self.base is None:
      return
    *batch, _, D = self.shape
    prompt, scale = tuple(self.prompt.shape), tuple(self.scale.shape)
    if len(prompt) != len(batch) + 3 or prompt != (*batch, *prompt[-3:-1], D):
      raise ValueError(f"Prompted: prompt has shape {prompt}; allowed: {(*batch, 'M', 'P', D)}")
    if scale != (*batch, 1, 1):
      raise ValueError(f"Prompted: scale has shape {scale}; allowed: {(*batch, 1, 1)}")

  def specs(self, axes: Sequence[Any]) -> "Prompted":
    *batch, _, columns = axes
    prompt = weights.specs(self.prompt, (*batch, None, None, columns))
    scale = weights.specs(self.scale, (*batch, None, None))
    return Prompted(weights.specs(self.base, axes), prompt, scale)

  def materialize(self) -> Array:
    return weights.materialize(self.base)

  def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    return weights.linear(x, self.base)

  def product(self, x: Array, multiply: Callable[[Array, Any], Array]) -> Array:
    return weights.product(x, self.base, multiply)

  def lookup(self, indices: Int[Array, "..."]) -> Float[Array, "... F"]:
    virtual = indices - self.shape[0]
    rows = weights.lookup(self.base, jnp.where(virtual < 0, indices, 0))
    prompt = (self.prompt / self.scale.reshape(())).reshape(-1, self.shape[-1])
    own = jnp.take(prompt, jnp.maximum(virtual, 0), axis=0, mode="clip")
    return jnp.where((virtual < 0)[..., None], rows, own.astype(rows.dtype))

  @property
  def T(self) -> Any:
    return weights.transpose(self.base)


def add(
  config: TransformerConfig,
  params: Params,
  key: Key,
  *,
  length: Size,
  prompts: Size = 1,
  start: str | Sequence[int] | Int[Array | np.ndarray, "N"] = "vocabulary",
) -> tuple[TransformerConfig, dict]:
  """The model with M soft prompts of P virtual tokens; all else is as before.

  Args:
    config, params: the model, whose table may be any `Weight`; `config` comes back as it is.
    key: PRNG key of what is drawn.
    length: P.
    prompts: M, from which `prepend` chooses for each row.
    start: "vocabulary" takes embeddings of tokens that are drawn, "random" draws from
      U(−½, ½), and ids [N] take those of a text, repeated or cut to P tokens.

  Raises:
    ValueError: for a table that has a prompt already, another start, or ids that are none.

  Example:
    >>> from effjax.models import Transformer, presets
    >>> params = Transformer(presets.TINY).init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> _, params = add(presets.TINY, params, jax.random.key(1), length=4, start=[5, 6])
    >>> table = params["embed"]["embedding"]
    >>> table.shape, table.prompt.shape, table.entries
    ((512, 64), (1, 4, 64), 516)

  Reference: sections 2 and 3.2; ids of a text are repeated or cut as in Hugging Face's peft.
  """
  (table,) = trees.select(params, f"^{PATH}$").values()
  if any(isinstance(part, Prompted) for part in _layers(table)):
    raise ValueError(f"{PATH} has a prompt already; allowed: one (soft_prompt.remove)")
  sizes = {"length": length, "prompts": prompts}
  P, M = (number(name, n, integer=True, least=1) for name, n in sizes.items())
  scale = jnp.full((1, 1), config.embed_scale, jnp.float32)
  prompt = _start(table, key, start, M, P, scale)
  return config, trees.update(params, f"^{PATH}$", lambda path, w: Prompted(w, prompt, scale))


def remove(config: TransformerConfig, params: Params) -> tuple[TransformerConfig, dict]:
  """The model without its soft prompts, as it was before they were added, bit for bit.

  Raises:
    ValueError: when it has none.
  """
  _prompted(params)
  return config, trees.update(params, f"^{PATH}$", lambda path, w: w.base)


def ids(params: Params, prompt: Size = 0) -> np.ndarray:
  """The ids [P] of the virtual tokens of one of the prompts.

  Raises:
    ValueError: for a prompt that there is none of.
  """
  table = _prompted(params)
  M, P, _ = table.prompt.shape
  first = table.shape[0] + P * number("prompt", prompt, integer=True, least=0, most=M - 1)
  return np.arange(first, first + P, dtype=np.int32)


def prepend(
  params: Params,
  batch: Given,
  *,
  prompt: Size | Sequence[int] | Int[Array | np.ndarray, "B"] = 0,
) -> Given:
  """Virtual tokens before each sequence: of a batch, of tokens [B, T], or of lists of prompts.

  In a batch they come before each packed document, whose segment id they have, and positions of
  tokens move by P. Virtual tokens are not counted, but for the last, whose target is the first
  token and whose weight is that of the first token; other entries [B, T, …] are 0 there. Rows with
  fewer documents than others get padding at their end. `global_positions` move with their tokens.
  It is done in numpy, as a batch is made.

  Args:
    params: a model with soft prompts.
    batch: a mapping with tokens [B, T] and what belongs to them; or tokens [B, T] alone, padded on
      the right if at all; or prompts of `decode.generate`, sequences of ids.
    prompt: which of the prompts, for all rows or for each.

  Raises:
    ValueError: for a prompt that there is none of, a batch of another form, and traced tokens.

  Example:
    >>> from effjax.models import Transformer, presets
    >>> params = Transformer(presets.TINY).init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> _, params = add(presets.TINY, params, jax.random.key(1), length=2)
    >>> prepend(params, [[7], [8, 9]])
    [[512, 513, 7], [512, 513, 8, 9]]
    >>> tokens, ids = np.array([[5, 6, 7]]), np.array([[0, 0, 1]])
    >>> packed = prepend(params, {"tokens": tokens, "targets": tokens + 1, "segment_ids": ids})
    >>> packed["tokens"].tolist(), packed["weights"].tolist()
    ([[512, 513, 5, 6, 512, 513, 7]], [[0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]])

  Reference: arXiv 2104.08691, section 2; labels are as in Hugging Face's peft.
  """
  given: Any = batch
  if isinstance(given, Mapping) and "tokens" not in given:
    raise ValueError(f"batch: has {trees.some(given)}; allowed: with tokens [B, T]")
  tokens = given["tokens"] if isinstance(given, Mapping) else given
  chosen = np.asarray(prompt)
  if chosen.shape not in ((), (len(tokens),)):
    raise ValueError(f"prompt: shape {chosen.shape}; allowed: one, or {len(tokens)}, one a row")
  chosen = np.broadcast_to(chosen, (len(tokens),))
  virtual = [ids(params, m) for m in chosen.tolist()]
  found: Any
  if isinstance(given, Mapping):
    found = widened(given, np.stack(virtual))
  elif hasattr(tokens, "shape"):
    found = widened({"tokens": tokens}, np.stack(virtual))["tokens"]
  elif any(np.ndim(row) != 1 for row in tokens):
    raise ValueError("batch: one of its prompts is no sequence; allowed: ids [T] each")
  else:
    found = [[*own.tolist(), *row] for own, row in zip(virtual, tokens, strict=True)]
  return found


def _prompted(params: Params) -> Prompted:
  (table,) = trees.select(params, f"^{PATH}$").values()
  if not isinstance(table, Prompted):
    raise ValueError(f"{PATH} has no prompt; allowed: what soft_prompt.add returns")
  return table


def _layers(w: Any) -> list[Any]:
  """`w` and what it stands over."""
  return [w, *_layers(w.base)] if isinstance(w, Over) else [w]


def _start(
  table: Array | Weight, key: Key, start: Any, M: int, P: int, scale: Array
) -> Float[Array, "M P D"]:
  V, D = table.shape
  if isinstance(start, str):
    if start == "random":
      return jax.random.uniform(key, (M, P, D), jnp.float32, -0.5, 0.5)
    if start != "vocabulary":
      raise ValueError(f"start={start!r}; allowed: 'vocabulary', 'random', or ids [N]")
    chosen = jax.random.randint(key, (M, P), 0, V)
  else:
    text = np.asarray(start)
    if text.ndim != 1 or not text.size:
      raise ValueError(f"start: shape {text.shape}; allowed: ids [N], one or more")
    check_ids("start", text, V)
    chosen = jnp.broadcast_to(jnp.asarray(np.resize(text, P), jnp.int32), (M, P))
  return weights.lookup(table, chosen).astype(jnp.float32) * scale[None]
