"""What does each technique cost and what is it worth, on one model and one text?

  scripts/run                                          (every technique; 6 minutes on 2 cores)
  scripts/run survey --config.techniques=int8,lora-r8  (some; finished rows are kept)
  scripts/run survey --config.tokens_per_parameter=20 --config.minutes=55 --workdir=results/survey

First SmolLM2-135M on held-out text: each technique that needs no training is applied to it as it
is. Then a small model, trained from scratch with each technique that needs it, at the FLOPs of one
dense run, over several seeds; by default for a fraction of the tokens that a verdict wants, which
the third command gives it (an hour; `results/survey/table.md` has what it found). The registry of
rows is `experiments/survey/techniques.py`.

Time is a ratio to the baseline's, measured in turns with it: prefill of one row of text, and greedy
decoding after a cache of 64 tokens. FLOPs are those of the forward pass a token.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from effjax import data
from effjax.data import Corpus
from effjax.train import workdir as files
from experiments import harness
from experiments.lab import budget, provenance, training
from experiments.lab.sizes import Rung
from experiments.lab.study import Study
from experiments.survey import pictures, table
from experiments.survey.pretrained import Pretrained
from experiments.survey.techniques import BASELINE, NAMED, TECHNIQUES, Technique
from experiments.survey.trained import Trained

PRETRAINED, TRAINED = "pretrained", "trained"


@dataclasses.dataclass
class Config:
  """What is measured.

  Attributes:
    techniques: names of `experiments.survey.techniques`, comma-separated; "pretrained", "trained"
      or "all".
    model: a name or path for `models.load`, or a preset such as "tiny", which starts at random.
    text: a source of `data.text`; its validation split measures, its training split trains.
    rows, length: rows of text, and tokens of each, that the pretrained model reads.
    decode: tokens decoded for their time.
    seeds: of each trained technique.
    tokens_per_parameter: of the dense baseline; 20 for a verdict.
    minutes: in which all trained techniques are to end on two cores; it decides their size.
    trained_rows: rows of held-out text that they are measured on.
  """

  techniques: str = "all"
  model: str = "smollm2-135m"
  text: str = "libraries"
  rows: int = 3
  length: int = 512
  decode: int = 8
  seeds: int = 4
  tokens_per_parameter: float = 0.5
  minutes: float = 1.5
  trained_rows: int = 512


def run(config: Config, workdir: str) -> list[harness.Row]:
  """The lines of the tables; writes them, the rows, a picture and their origin to `workdir`."""
  chosen = choose(config.techniques)
  rung = budget.largest(
    sum(technique.trained for technique in TECHNIQUES) * config.seeds,
    tokens_per_parameter=config.tokens_per_parameter,
    minutes=config.minutes,
  )
  training.use_every_core()
  folder = files.claim(workdir, config, free=("techniques",))
  corpus = data.text(config.text)
  source = provenance.write(folder, corpus)
  measured = harness.compute(folder, _tasks(config, folder, rung, corpus, chosen), label="survey")
  harness.plot(folder, pictures.panels)
  heading = budget.title(rung, config.tokens_per_parameter, config.seeds)
  tables = table.tables(measured, f"{config.model} as it is", heading)
  claims = table.claims(measured)
  harness.write_csv(folder, [row for _, rows, _ in tables for row in rows])
  files.write_text(folder / "table.md", markdown(tables, claims, source))
  for heading, rows, columns in tables[:-1]:
    print(f"\n{heading}\n\n{harness.table(rows, columns)}")
  print(f"\n{tables[-1][0]}")
  harness.finish(folder, *tables[-1][1:], claims)
  return [row for _, rows, _ in tables for row in rows]


def choose(text: str) -> list[Technique]:
  """The techniques of a list of names and kinds, and the trained ones that they stand against.

  Raises:
    ValueError: for a name that is none.
  """
  kinds: dict[str, list[str]] = {PRETRAINED: [], TRAINED: []}
  for technique in TECHNIQUES:
    kinds[TRAINED if technique.trained else PRETRAINED].append(technique.name)
  wanted = harness.chosen(text, [*kinds, *NAMED], what="technique")
  names = {name for word in wanted for name in kinds.get(word, [word])}
  while more := {_base(NAMED[name]) for name in names} - names:
    names |= more
  return [technique for technique in TECHNIQUES if technique.name in names]


def _base(technique: Technique) -> str:
  return technique.against or BASELINE


def _tasks(
  config: Config, folder: Path, rung: Rung, corpus: Corpus, chosen: list[Technique]
) -> dict[str, Callable[[], harness.Row]]:
  """What computes each row: one for a technique, or one for each seed of a trained one."""
  sizes = {"rows": config.rows, "length": config.length, "decode": config.decode}
  pretrained = Pretrained(config.model, corpus, **sizes)
  study = Study(
    rung,
    corpus,
    tokens_per_parameter=config.tokens_per_parameter,
    seeds=range(config.seeds),
    folder=folder,
  )
  trained = Trained(study, rows=config.trained_rows, decode=config.decode)
  tasks: dict[str, Callable[[], harness.Row]] = {}
  for technique in chosen:
    if not technique.trained:
      tasks[technique.name] = functools.partial(pretrained.row, technique)
    else:
      tasks |= study.tasks(technique.name, functools.partial(trained.rows, technique))
  return tasks


def markdown(tables: list[tuple], claims: dict, source: harness.Row) -> str:
  """The tables with their headings, the verdicts, and where all of it comes from."""
  parts = [f"{heading}:\n\n{harness.markdown(*rest)}" for heading, *rest in tables]
  verdicts = [f"* {line}" for line in harness.findings(claims)]
  return "\n\n".join([*parts, "\n".join(verdicts), provenance.sentence(source)]) + "\n"


if __name__ == "__main__":
  harness.main(run, Config())
