"""The rows of the survey that treat the pretrained model as it is."""

import functools

import jax

from effjax import data
from experiments.harness import Row
from experiments.lab.held_out import HeldOut, held_out
from experiments.lab.speed import Runner, compare
from experiments.lab.subject import Subject, costs, load
from experiments.survey.techniques import BASELINE, Technique


class Pretrained:
  """A model and the held-out text that it reads, loaded when a row wants them."""

  def __init__(self, model: str, corpus: data.Corpus, *, rows: int, length: int, decode: int):
    self._model, self._corpus = model, corpus
    self._rows, self._length, self._decode = rows, length, decode

  def row(self, technique: Technique) -> Row:
    """Costs, nats, bits and times of a technique."""
    subject = technique.make(self._subject, jax.random.key(0))
    runner = self._baseline if technique.name == BASELINE else self._runner(subject)
    found = compare(runner, self._baseline, self._text.batches)
    return {
      "technique": technique.name,
      "kind": technique.kind,
      "model": self._model,
      **costs(subject, self._length),
      **found,
      **self._text.paid(found["nll"] * self._text.tokens),
    }

  def _runner(self, subject: Subject) -> Runner:
    return Runner(subject, self._text.batches[0], decode=self._decode)

  @functools.cached_property
  def _baseline(self) -> Runner:
    return self._runner(self._subject)

  @functools.cached_property
  def _loaded(self):
    return load(self._model)

  @property
  def _subject(self) -> Subject:
    return self._loaded[0]

  @functools.cached_property
  def _text(self) -> HeldOut:
    tokenizer = self._loaded[1]
    sizes = {"rows": self._rows, "length": self._length, "batch_size": 1}
    return held_out(self._corpus, tokenizer, **sizes)
