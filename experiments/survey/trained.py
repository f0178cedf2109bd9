"""The rows of the survey that train small models: all seeds of a technique in one program."""

import functools

from experiments.harness import Row
from experiments.lab.held_out import HeldOut, nats
from experiments.lab.speed import Runner, compare
from experiments.lab.study import Study
from experiments.lab.subject import Subject, costs
from experiments.survey.techniques import TRAINED_BASELINE, Technique

TIMED = 8  # batches that are read for their time


class Trained:
  """A study and the held-out text that its models are measured on."""

  def __init__(self, study: Study, *, rows: int, decode: int):
    self.study, self._rows, self._decode = study, rows, decode

  def rows(self, technique: Technique) -> list[Row]:
    """What a technique is worth with each seed; times and costs are the first one's."""
    study, run = self.study, technique.make(self.study)
    subject = study.trained(technique.name, run)
    steps, length = study.steps(run), study.rung.length
    common = {
      "technique": technique.name,
      "kind": technique.kind,
      "model": study.rung.name,
      "against": technique.against,
      "steps": steps,
      "tokens": steps * study.rung.batch * length,
      **costs(subject.at(0), length),
      **self._times(technique, subject.at(0)),
    }
    paid = nats(subject, self._text).tolist()
    return [{**common, **self._text.paid(each)} for each in paid]

  def _times(self, technique: Technique, subject: Subject) -> Row:
    is_baseline = technique.name == TRAINED_BASELINE
    runner = self._baseline if is_baseline else self._runner(subject)
    return compare(runner, self._baseline, self._text.batches[:TIMED])

  def _runner(self, subject: Subject) -> Runner:
    return Runner(subject, self._text.batches[0], decode=self._decode)

  @functools.cached_property
  def _baseline(self) -> Runner:
    return self._runner(self.study.fresh(self.study.dense).at(0))

  @functools.cached_property
  def _text(self) -> HeldOut:
    return self.study.held_out(self._rows)
