"""How fast a model reads and decodes beside another, the two in turns."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.typing import Params, PyTree
from effjax.decode import unrolled
from effjax.models import Transformer
from experiments.harness import Row
from experiments.lab.subject import Subject, token_nll


class Runner:
  """A subject ready to read batches and to decode: its programs compiled and run once.

  For decoding, layers have arrays of their own (`decode.unrolled`): slicing a stack would cost more
  than the products.
  """

  def __init__(self, subject: Subject, batch: dict[str, np.ndarray], *, decode: int):
    """Prepares for batches shaped like `batch`, and to decode `decode` tokens after up to 64."""
    self._module, self._params = subject.module, subject.params
    self._decoder, self._decoder_params = unrolled(self._module, self._params)
    self._first, self.decoded = min(64, subject.config.context - decode), decode
    self._cache = self._decoder.init_cache(1, self._first + decode)
    self.score(batch)
    self.decode()

  def score(self, batch: dict[str, np.ndarray]) -> tuple[float, float]:
    """Σ w·nll and Σ w of a batch."""
    total, weight = _score(self._module, self._params, batch)
    return float(total), float(weight)

  def decode(self) -> None:
    """Decodes greedily, for its time."""
    steps = (self._first, self.decoded)
    jax.block_until_ready(_decode(self._decoder, *steps, self._decoder_params, self._cache))


def compare(runner: Runner, baseline: Runner, batches: Sequence[dict], *, rounds: int = 4) -> Row:
  """Mean nll over `batches`, and prefill and decode times as ratios to the baseline's.

  The two take turns, and a ratio is the median over turns; the runner that is its own baseline has
  ratios of one.
  """
  scores, reading, reading_base = [], [], []
  for batch in batches:
    seconds, score = timed(functools.partial(runner.score, batch))
    again = runner is not baseline
    reading.append(seconds)
    reading_base.append(timed(functools.partial(baseline.score, batch))[0] if again else seconds)
    scores.append(score)
  decoding, decoding_base = [], []
  for _ in range(rounds):
    decoding.append(timed(runner.decode)[0])
    decoding_base.append(timed(baseline.decode)[0] if runner is not baseline else decoding[-1])
  total, weight = map(sum, zip(*scores, strict=True))
  return {
    "nll": total / weight,
    "prefill_ms": 1e3 * statistics.median(reading),
    "decode_ms": 1e3 * statistics.median(decoding) / runner.decoded,
    "prefill_ratio": ratio(reading, reading_base),
    "decode_ratio": ratio(decoding, decoding_base),
  }


def timed(call: Callable):
  """Seconds that a call takes, and what it returns."""
  start = time.perf_counter()
  result = call()
  return time.perf_counter() - start, result


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
  """The median of the ratios of measurements taken in turns.

  Example:
    >>> ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0])
    2.0
  """
  return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


@functools.partial(jax.jit, static_argnums=0)
def _score(module: Transformer, params: Params, batch: dict):
  values = token_nll(module, params, batch)
  return (values * batch["weights"]).sum(), batch["weights"].sum()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(module: Transformer, first: int, count: int, params: Params, cache: PyTree):
  def step(i, carry):
    token, cache = carry
    positions = jnp.full((1, 1), first + i, jnp.int32)
    logits, cache = module.apply({"params": params}, token, positions=positions, cache=cache)
    return jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32), cache

  return jax.lax.fori_loop(0, count, step, (jnp.zeros((1, 1), jnp.int32), cache))[0]
