"""Settings, and what all rows share: the model, the grid, vectors of its texts, compiled steps."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import optax

from effjax.data import pairs
from effjax.data.cache import write_whole
from effjax.data.tokenizers import Tokenizer
from effjax.peft.retrieval import in_batch
from effjax.train import make_train_step, through
from effjax.train.step import Step
from experiments import harness
from experiments.lab.subject import Subject, load
from experiments.peft.retrieval.prefixed import Prefixed, adam, encode
from experiments.peft.retrieval.task import Grid

MIXING = 0.1  # the rate of weights, which begin at 0 and 1


@dataclasses.dataclass
class Config:
  """What is trained, on what.

  Attributes:
    model: a name or path for `models.load`, or a preset such as "tiny", which starts at random.
    domains, tasks: sources of `data.entries` and names of `data.pairs.TASKS`, comma-separated.
    entries, queries: entries of a domain that are trained on, and that are held out.
    length: tokens that are read of a text.
    pool: how an encoder's tokens become a vector, "mean" or "first".
    unit: whether vectors have length one.
    temperature: what dot products are divided by in training.
    hard: whether the other part of an entry is a candidate in training.
    documents: the prefix before them, "none" (the paper) or "general" (its code).
    second: what the second stage trains, "modules" (the paper) or "all" (its code).
    prefix: its length.
    batch, steps, rate: queries of a step, steps of a stage, and Adam's largest rate.
    seeds: comma-separated; each holds other combinations out.
  """

  model: str = "minilm"
  domains: str = "wordnet,foldoc,manpages,python3.11-doc"
  tasks: str = "define,expand,name,continue"
  entries: int = 100
  queries: int = 30
  length: int = 32
  pool: str = "mean"
  unit: bool = True
  temperature: float = 0.05
  hard: bool = True
  documents: str = "none"
  second: str = "modules"
  prefix: int = 8
  batch: int = 16
  steps: int = 16
  rate: float = 0.03
  seeds: str = "0,1"


def checked(config: Config) -> tuple[list[str], list[str], list[int]]:
  """Domains, tasks and seeds.

  Raises:
    ValueError: for settings that are out of range.
  """
  for name, allowed in (("documents", ("none", "general")), ("second", ("modules", "all"))):
    if (given := getattr(config, name)) not in allowed:
      raise ValueError(f"{name}={given!r}; allowed: {' or '.join(map(repr, allowed))}")
  for name in ("entries", "queries", "length", "prefix", "batch", "steps"):
    if (given := getattr(config, name)) < 1:
      raise ValueError(f"{name}={given}; allowed: from 1")
  for name in ("rate", "temperature"):
    if not (given := getattr(config, name)) > 0:
      raise ValueError(f"{name}={given}; allowed: above 0")
  domains = [part.strip() for part in config.domains.split(",")]
  tasks = harness.chosen(config.tasks, pairs.TASKS, what="task")
  pairs.diagonal(domains, tasks)
  return domains, tasks, harness.numbers("seeds", config.seeds, int, least=0)


@dataclasses.dataclass(frozen=True)
class Shared:
  """What is made when first asked for.

  Attributes:
    config: the settings.
    folder: of the results.
    domains, tasks: names.
  """

  config: Config
  folder: Path
  domains: list[str]
  tasks: list[str]

  @functools.cached_property
  def model(self) -> Prefixed:
    """The encoder."""
    c, subject = self.config, self._base[0]
    shape = dataclasses.replace(subject.config, head=None)
    modules = len(self.domains) + len(self.tasks)
    return Prefixed(shape, subject.params, c.prefix, modules, c.pool, c.unit)

  @functools.cached_property
  def grid(self) -> Grid:
    """The texts."""
    c, tokenizer = self.config, self._base[1]
    sizes = {"train": c.entries, "validation": c.queries}
    return Grid(self.domains, self.tasks, tokenizer, sizes=sizes, length=c.length)

  @functools.cached_property
  def vectors(self) -> np.ndarray:
    """Of all texts, by the model as it is; kept in the folder."""
    path = self.folder / "vectors.npy"
    if not path.exists():
      every = self.grid.read(np.arange(len(self.grid.texts)))
      found = encode(self.model.plain, self.model.params, every)
      write_whole(path, lambda file: np.save(file, found))
    return np.load(path)

  @functools.cached_property
  def training(self) -> tuple[Step, optax.GradientTransformation, int]:
    """Of a prefix and its modules: the step, its optimiser, and how many there are."""
    optimizer = adam(self.config.rate, self.config.steps)
    objective = in_batch(self.model.modular, temperature=self.config.temperature)
    return make_train_step(objective, optimizer), optimizer, self.config.steps

  @functools.cached_property
  def weighing(self) -> tuple[Step, optax.GradientTransformation, int]:
    """The same of weights of modules, a quarter as many steps."""
    steps = -(-self.config.steps // 4)
    optimizer = adam(MIXING, steps)
    objective = in_batch(self.model.weighed, temperature=self.config.temperature)
    return make_train_step(through(objective, self.model.fold), optimizer), optimizer, steps

  @functools.cached_property
  def _base(self) -> tuple[Subject, Tokenizer]:
    return load(self.config.model)
