"""Generation: prompts in, tokens out, the loop over tokens inside one compiled program."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import spmd
from effjax.core.known import check_ids, number
from effjax.core.typing import Array, DTypeLike, Int, Key, Params, PyTree, Scalar, Size
from effjax.decode import sampling
from effjax.decode.cache import bucket, check_padding, prefill
from effjax.layers.embedding import known_ids

NO_END = -2
_MOST = int(np.iinfo(np.int32).max)


class Generation(NamedTuple):
  """What `generate` returns.

  Attributes:
    tokens: [B, max_new_tokens], the new tokens of each row; `pad_id` after its end.
    lengths: [B], how many there are, an end token included.
  """

  tokens: Int[Array, "B T"]
  lengths: Int[Array, "B"]


class _State(NamedTuple):
  """Loop state: step, output so far, last token and the one before, position, ended rows, cache."""

  step: Array
  tokens: Array
  lengths: Array
  last: Array
  previous: Array
  position: Array
  ended: Array
  cache: PyTree


def generate(
  module: nn.Module,
  params: Params,
  prompts: Int[Array | np.ndarray, "B T"] | Sequence[Sequence[int]],
  *,
  max_new_tokens: Size,
  lengths: Int[Array | np.ndarray, "B"] | Sequence[int] | None = None,
  key: Key | None = None,
  temperature: Scalar = 0.0,
  top_k: Size | Array | np.ndarray | None = None,
  top_p: Scalar | None = None,
  eos_id: Size | Sequence[Size] | np.ndarray | None = None,
  pad_id: Size = 0,
  padding: str = "right",
  cache_dtype: DTypeLike | None = None,
) -> Generation:
  """Continues each prompt until an end token or `max_new_tokens`, all rows together.

  x_t ~ distribution(logits(x_<t)), see `sampling.distribution`; temperature 0 takes the largest
  logit. Caches and states absorb each token once, padding and rows that have ended never. Prompt
  and loop are one jitted program that stops when every row has ended, without a host round trip
  between tokens. It is compiled for a batch size and for buckets of the prompt length and of the
  total length (`cache.bucket`), not for their values, nor for temperature, top_k, top_p or end
  tokens. A row's tokens do not depend on the rows beside it, unless a router limits how many an
  expert takes in evaluation (`Capacity.evaluation`).

  Args:
    module: a decoder with a causal mixer in each layer, as `Transformer`, which is given tokens,
      positions, segment_ids, previous and cache. `unrolled` makes one that is faster on a CPU.
    params: its parameters, in any weight representation.
    prompts: sequences of token ids, or an array [B, T] whose padding may hold any ids.
    max_new_tokens: tokens to add at most.
    lengths: [B], tokens in each row of an array of prompts; None means T.
    key: key of the draws; not needed at temperature 0.
    temperature, top_k, top_p: as in `sampling.distribution`, numbers or [B].
    eos_id: one or several tokens that end a row, or None.
    pad_id: fills a row after its end; any 32-bit integer.
    padding: on which side of an array of prompts the padding lies, "right" or "left".
    cache_dtype: in which keys and values are kept, as `dtype` of `Transformer.init_cache`: int8
      takes about a quarter of float32's bytes. None means the type of the activations.

  Returns:
    A `Generation`: the new tokens and their number. Where logits are no numbers (NaN, −∞ only) a
    row ends with −1.

  Raises:
    ValueError: for prompts that are empty, no integers, out of the vocabulary or, with
      `max_new_tokens`, longer than the model's context; for lengths that do not fit; for another
      `padding`; for sampling arguments that define no distribution; for a missing key; and for
      mixers that have no caches, or none in `cache_dtype`.

  Example:
    >>> from effjax.models import Transformer, presets
    >>> module = Transformer(presets.TINY)
    >>> params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    >>> out = generate(module, params, [[1, 2, 3], [4]], max_new_tokens=5)
    >>> out.tokens.shape, out.lengths.tolist()
    ((2, 5), [5, 5])
  """
  tokens, counts = _padded(prompts, lengths, padding)
  max_new_tokens = number("max_new_tokens", max_new_tokens, integer=True, least=1, most=_MOST)
  pad_id = number("pad_id", pad_id, integer=True, least=-_MOST - 1, most=_MOST)
  _check(module, params, tokens, counts, max_new_tokens)
  rule = _rule(key, counts.shape, temperature=temperature, top_k=top_k, top_p=top_p)
  context, longest = module.config.context, int(counts.max())
  prompt = _widened(tokens[:, :longest], min(bucket(longest), context))
  tokens, counts = _run(
    module,
    params,
    prompt,
    counts,
    jnp.asarray(_ends(eos_id, module.config.vocab_size)),
    np.int32(max_new_tokens),
    np.int32(pad_id),
    key if rule else None,
    rule,
    slots=min(bucket(max(longest + max_new_tokens, prompt.shape[1])), context),
    room=bucket(max_new_tokens),
    cache_dtype=None if cache_dtype is None else jnp.dtype(cache_dtype),
  )
  return Generation(tokens[:, :max_new_tokens], counts)


def _widened(tokens: np.ndarray, width: int) -> np.ndarray:
  """Rows of tokens with zeros up to `width`."""
  return np.pad(tokens, ((0, 0), (0, width - tokens.shape[1]))).astype(np.int32)


def _rule(key: Key | None, shape: tuple[int, ...], **given: Any) -> dict[str, Array]:
  """The sampling arguments of each row that are not None, checked; none where the choice is greedy.

  Raises:
    ValueError: for arguments that define no distribution, and for a missing key.
  """
  known = {name: sampling.checked(name, x, shape) for name, x in given.items() if x is not None}
  if sampling.is_greedy(known["temperature"]):
    return {}
  if key is None:
    temperature = given["temperature"]
    raise ValueError(f"key is None with temperature {temperature}; allowed: a jax.random key")
  return {name: jnp.broadcast_to(x, shape) for name, x in known.items()}


@functools.partial(jax.jit, static_argnames=("module", "slots", "room", "cache_dtype"))
def _run(module, params, prompt, *rest, slots, room, cache_dtype):
  empty = lambda: module.init_cache(prompt.shape[0], slots, dtype=cache_dtype)
  loop = functools.partial(_loop, module, empty, room)
  return spmd.automatic(loop, (params, prompt, *rest), prompt, spmd.nowhere)


def _loop(module, empty, room, params, prompt, counts, ends, limit, pad, key, rule):
  batch = prompt.shape[0]
  rows = jnp.arange(batch)
  cache = prefill(module, params, prompt, counts - 1, empty())
  state = _State(
    step=jnp.int32(0),
    tokens=jnp.full((batch, room), pad, jnp.int32),
    lengths=jnp.zeros(batch, jnp.int32),
    last=prompt[rows, counts - 1],
    previous=jnp.where(counts > 1, prompt[rows, counts - 2], -1),
    position=counts - 1,
    ended=jnp.zeros(batch, bool),
    cache=cache,
  )

  def advance(state: _State) -> _State:
    logits, cache = module.apply(
      {"params": params},
      state.last[:, None],
      positions=state.position[:, None],
      segment_ids=-state.ended.astype(jnp.int32)[:, None],
      previous=state.previous[:, None],
      cache=state.cache,
    )
    chosen = _choose(logits[:, 0], key, state.step, rule)
    chosen = jnp.where(state.ended, pad, chosen)
    alive = (~state.ended).astype(jnp.int32)
    return _State(
      step=state.step + 1,
      tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, chosen[:, None], state.step, 1),
      lengths=state.lengths + alive,
      last=chosen,
      previous=state.last,
      position=state.position + alive,
      ended=state.ended | (chosen[:, None] == ends[None]).any(1) | (chosen == sampling.NO_TOKEN),
      cache=cache,
    )

  unfinished = lambda state: (state.step < limit) & ~state.ended.all()
  state = jax.lax.while_loop(unfinished, advance, state)
  return state.tokens, state.lengths


def _choose(logits: Array, key: Key | None, step: Array, rule: dict) -> Int[Array, "B"]:
  if key is None:
    return sampling.sample(logits, temperature=0)
  step_key = jax.random.fold_in(key, step)
  row_keys = jax.vmap(lambda row: jax.random.fold_in(step_key, row))(jnp.arange(len(logits)))
  draw = lambda row, row_key, rule: sampling.sample(row, row_key, **rule)
  return jax.vmap(draw)(logits, row_keys, rule)


def _padded(prompts, lengths, padding: str) -> tuple[np.ndarray, np.ndarray]:
  """Prompts as an array padded on the right, and their lengths."""
  check_padding(padding)
  if not hasattr(prompts, "shape"):
    if lengths is not None or padding != "right":
      raise ValueError(
        "lengths or padding given with a list of prompts; allowed: with an array [B, T]"
      )
    rows_given = [np.asarray(row) for row in prompts]
    for row in rows_given:
      if row.ndim != 1 or (len(row) and not np.issubdtype(row.dtype, np.integer)):
        raise ValueError(
          f"prompts: one is {row.dtype}{list(row.shape)}; allowed: integers [T] each"
        )
    lengths = [len(row) for row in rows_given]
    rows = np.zeros((len(lengths), max(lengths, default=0)), np.int64)
    for i, row in enumerate(rows_given):
      rows[i, : lengths[i]] = row
    prompts = rows
  tokens = np.asarray(prompts)
  if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
    raise ValueError(f"prompts: {tokens.dtype}{list(tokens.shape)}; allowed: integers [B, T]")
  lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else lengths
  counts = np.asarray(lengths, None if len(tokens) else np.int32)
  if counts.shape != tokens.shape[:1] or not np.issubdtype(counts.dtype, np.integer):
    raise ValueError(f"lengths: {counts.dtype}{list(counts.shape)}; allowed: integers [B]")
  if not len(tokens) or counts.min() < 1:
    raise ValueError("prompts: one is empty; allowed: at least one prompt, each of a token or more")
  if counts.max() > tokens.shape[1]:
    raise ValueError(f"lengths: {counts.max()}; allowed: up to the width {tokens.shape[1]}")
  if padding == "left":
    places = np.arange(tokens.shape[1])[None] - counts[:, None]
    tokens = np.take_along_axis(tokens, places % tokens.shape[1], axis=1)
  return tokens, counts.astype(np.int32)


def _check(
  module, params: Params, tokens: np.ndarray, counts: np.ndarray, max_new_tokens: int
) -> None:
  config = module.config
  if config.head is None:
    raise ValueError("module: its config has head=None; allowed: a model that gives logits")
  real = np.arange(tokens.shape[1])[None] < counts[:, None]
  check_ids("prompts", tokens, known_ids(config.vocab_size, params), real)
  total = int(counts.max()) + max_new_tokens
  if total > config.context:
    raise ValueError(
      f"prompt of {counts.max()} tokens and max_new_tokens {max_new_tokens}: {total} positions; "
      f"allowed: up to {config.context}"
    )


def _ends(eos_id, vocab_size: int) -> np.ndarray:
  if eos_id is None:
    return np.asarray([NO_END], np.int32)
  listed = isinstance(eos_id, Sequence) or np.ndim(eos_id)
  ends = [
    number("eos_id", end, integer=True, least=0, most=vocab_size - 1)
    for end in (eos_id if listed else [eos_id])
  ]
  return np.asarray(ends or [NO_END], np.int32)
