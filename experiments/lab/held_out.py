"""Held-out text, and what a model pays for it: nats a token, and bits a byte.

Bits a byte count the bytes of text behind the scored tokens, so that models of different
vocabularies compare. The token that ends a document is scored too and has no bytes.
"""

import dataclasses
import functools
import math

import jax
import numpy as np

from effjax.core.typing import Array, Params
from effjax.data import Corpus, Tokenizer, loader
from effjax.models import Transformer
from experiments.harness import Row
from experiments.lab.subject import Subject, token_nll


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Rows of a validation split.

  Attributes:
    batches: of [rows, length], as `data.loader` gives them.
    nbytes: bytes of text behind the tokens that are scored.
  """

  batches: list[dict[str, np.ndarray]]
  nbytes: int

  @property
  def tokens(self) -> int:
    """Tokens that are scored."""
    return int(sum(batch["weights"].sum() for batch in self.batches))

  def paid(self, nats: float) -> Row:
    """Nats a token and bits a byte of a model that pays `nats` for all of it."""
    return {"nll": nats / self.tokens, "bits_byte": nats / math.log(2) / self.nbytes}


def held_out(
  corpus: Corpus, tokenizer: Tokenizer, *, rows: int, length: int, batch_size: int
) -> HeldOut:
  """The first `rows` rows of the validation split in a fixed order, in batches.

  Example:
    >>> from effjax.data import ByteTokenizer, text
    >>> sizes = {"rows": 4, "length": 64, "batch_size": 2}
    >>> found = held_out(text("pydoc", limit_bytes=50_000), ByteTokenizer(), **sizes)
    >>> len(found.batches), found.tokens - found.nbytes < 4
    (2, True)
  """
  batches = loader(
    corpus, tokenizer, batch_size=batch_size, length=length, seed=0, split="validation"
  )
  chosen = [next(batches) for _ in range(max(1, rows // batch_size))]
  return HeldOut(chosen, sum(_nbytes(batch, tokenizer) for batch in chosen))


def nats(subject: Subject, text: HeldOut) -> np.ndarray:
  """Nats that the model of each seed pays for all of the text, [seeds]."""
  score = lambda batch: _nats(subject.module, subject.params, batch)
  return np.stack([score(batch) for batch in text.batches]).sum(axis=0, dtype=np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _nats(module: Transformer, params: Params, batch: dict) -> Array:
  one = lambda params: (token_nll(module, params, batch) * batch["weights"]).sum()
  return jax.vmap(one)(params)


def _nbytes(batch: dict[str, np.ndarray], tokenizer: Tokenizer) -> int:
  rows = zip(batch["targets"], batch["weights"] > 0, strict=True)
  return sum(len(tokenizer.decode(targets[scored]).encode()) for targets, scored in rows)
