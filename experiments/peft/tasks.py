"""What a method is compared on: a text that a decoder continues, a dictionary that an encoder asks.

Both have batches to train on, an objective, and a score on what was held out.
"""

import abc
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from effjax import data
from effjax.core.typing import Array, Params
from effjax.data.tokenizers import Tokenizer
from effjax.models import Transformer
from effjax.peft import ranking
from effjax.peft.retrieval import Encoder, in_batch, in_batch_nll
from effjax.train import next_token
from effjax.train.objectives import Batch, Objective
from experiments.harness import Row
from experiments.lab.held_out import HeldOut, held_out
from experiments.lab.subject import Subject, load, token_nll
from experiments.peft.methods import Method
from experiments.peft.retrieval.prefixed import encode
from experiments.peft.retrieval.task import Grid

TEMPERATURE = 0.05  # of in-batch cross-entropy
loaded = functools.cache(load)


class Task(abc.ABC):
  """A model and what it is to learn.

  Attributes:
    metric: the column of `score` by which methods are compared.
    sign: 1 where it is to fall, −1 where it is to rise.
  """

  metric: str
  sign: int

  @property
  @abc.abstractmethod
  def subject(self) -> Subject:
    """The model as it is."""

  @property
  @abc.abstractmethod
  def corpus(self) -> data.Corpus:
    """The text."""

  @abc.abstractmethod
  def objective(self, subject: Subject) -> Objective:
    """What training minimises."""

  @abc.abstractmethod
  def batches(self, method: Method, params: Params, seed: int) -> Iterator[Batch]:
    """What it reads, in the order of a seed."""

  @abc.abstractmethod
  def score(self, method: Method, subject: Subject) -> Row:
    """How well the model does on what was held out."""


class Continuing(Task):
  """Nats a token of the text that was held out; virtual tokens predict nothing that counts."""

  metric, sign = "nats/token", 1

  def __init__(self, model: str, text: str, *, rows: int, length: int, batch: int):
    """`rows` are held out, of `length` tokens; a step has `batch` of them."""
    self._model, self._text, self._rows = model, text, rows
    self._sizes: Any = {"length": length, "batch_size": batch}

  @functools.cached_property
  def corpus(self) -> data.Corpus:
    return data.text(self._text)

  @functools.cached_property
  def _loaded(self) -> tuple[Subject, Tokenizer]:
    return loaded(self._model)

  @property
  def subject(self) -> Subject:
    return self._loaded[0]

  @functools.cached_property
  def held_out(self) -> HeldOut:
    return held_out(self.corpus, self._loaded[1], rows=self._rows, **self._sizes)

  def objective(self, subject: Subject) -> Objective:
    return next_token(subject.module)

  def batches(self, method: Method, params: Params, seed: int) -> Iterator[Batch]:
    for batch in data.loader(self.corpus, self._loaded[1], seed=seed, **self._sizes):
      yield self._read(method, params, batch)

  def score(self, method: Method, subject: Subject) -> Row:
    read = functools.partial(self._read, method, subject.params)
    nats = sum(float(_nats(subject.module, subject.params, read(b))) for b in self.held_out.batches)
    paid = self.held_out.paid(nats)
    return {self.metric: paid["nll"], "bits/byte": paid["bits_byte"]}

  def _read(self, method: Method, params: Params, batch: Batch) -> Batch:
    found = dict(method.batch(params, batch))
    own = found["tokens"] < self.subject.config.vocab_size
    return found | {"weights": np.where(own, found["weights"], 0)}


class Asking(Task):
  """The mean reciprocal rank, among the texts of all held-out entries, of the one asked for.

  Queries are encoded by what is trained, documents by the model as it is, so that an index of them
  stays as it is; in training the entry's other text is a candidate too.
  """

  metric, sign = "mrr", -1

  def __init__(
    self, model: str, domain: str, task: str, *, entries: int, queries: int, length: int, batch: int
  ):
    """`entries` are trained on and `queries` held out; a step has `batch` of `length` tokens."""
    self._model, self._cell, self._length, self._batch = model, (domain, task), length, batch
    self._entries = {"train": entries, "validation": queries}

  @functools.cached_property
  def _loaded(self) -> tuple[Subject, Tokenizer]:
    return loaded(self._model)

  @functools.cached_property
  def subject(self) -> Subject:
    shape, params = self._loaded[0].config, self._loaded[0].params
    kept = {name: tree for name, tree in params.items() if name != "head"}
    return Subject(dataclasses.replace(shape, head=None), kept)

  @functools.cached_property
  def grid(self) -> Grid:
    domain, task = self._cell
    sizes: Any = {"sizes": self._entries, "length": self._length}
    return Grid([domain], [task], self._loaded[1], **sizes)

  @property
  def corpus(self) -> data.Corpus:
    return self.grid.corpus

  @functools.cached_property
  def _vectors(self) -> np.ndarray:
    every = self.grid.read(np.arange(len(self.grid.texts)))
    return encode(self._encoder(self.subject), self.subject.params, every)

  def objective(self, subject: Subject) -> Objective:
    return in_batch(self._encoder(subject), temperature=TEMPERATURE)

  def batches(self, method: Method, params: Params, seed: int) -> Iterator[Batch]:
    options: Any = {"vectors": self._vectors, "hard": True, "modular": False}
    rng = np.random.default_rng(seed)
    for batch in self.grid.batches([self._cell], self._batch, rng, **options):
      own = {name: batch[name] for name in ("tokens", "segment_ids")}
      yield batch | dict(method.batch(params, own))

  def score(self, method: Method, subject: Subject) -> Row:
    queries = self.grid.read(self.grid.rows("validation", self._cell)[:, 0])
    read: Any = dict(method.batch(subject.params, queries))
    vectors = encode(self._encoder(subject), subject.params, read)
    found = self.grid.found(vectors, self._vectors[self.grid.pool], self._cell)
    return found | {"nats": self._nats(vectors)}

  def _nats(self, queries: np.ndarray) -> float:
    """The mean cross-entropy of the document asked for, among all."""
    rows, pool = self.grid.rows("validation", self._cell), self.grid.pool
    relevant = np.array([pool.tolist().index(place) for place in rows[:, 1]])
    hidden = ranking.hidden(pool, relevant, rows[:, 0])
    options: Any = {"relevant": relevant, "hidden": hidden, "temperature": TEMPERATURE}
    return float(in_batch_nll(queries, self._vectors[pool], **options).mean())

  def _encoder(self, subject: Subject) -> Encoder:
    return Encoder(Transformer(subject.config))


@functools.partial(jax.jit, static_argnums=0)
def _nats(module: Transformer, params: Params, batch: Batch) -> Array:
  return (token_nll(module, params, batch) * batch["weights"]).sum()
