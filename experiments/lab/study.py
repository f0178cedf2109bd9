"""A study: small models of one size, trained on one text within one budget, over several seeds."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from effjax import data
from effjax.core.typing import Key
from effjax.data.tokenizers import BPETokenizer
from effjax.models import TransformerConfig
from effjax.train import next_token
from effjax.train import workdir as files
from effjax.train.objectives import Objective
from effjax.train.step import After
from experiments.harness import Row
from experiments.lab import training
from experiments.lab.budget import Budget, Spending
from experiments.lab.held_out import HeldOut, held_out
from experiments.lab.sizes import Rung
from experiments.lab.subject import Subject, fresh, keys

SAMPLE_BYTES = 1_000_000  # of the training split, for the vocabulary
ORDERS = 1000  # above any seed


@dataclasses.dataclass(frozen=True)
class Run:
  """What is trained: a model of each seed, arrays with a leading axis of seeds.

  Attributes:
    subject: where it starts.
    objective: None is next-token prediction; arrays in it have the axis of seeds too.
    spending: how it uses the budget.
    order: which of its orders of the text a seed reads; what goes on from a start reads another.
    after: what ends a step of each seed, see `effjax.train.make_train_step`.
    watch: pattern of the metrics of the objective that `Study.history` has; None is none.
  """

  subject: Subject
  objective: Objective | None = None
  spending: Spending = Spending()
  order: int = 0
  after: After | None = None
  watch: str | None = None


class Study:
  """Text, vocabulary, budget and seeds that runs share; what was trained is kept on disk.

  Attributes:
    rung: size of the dense model, and how it trains.
    budget: what the runs may spend.
    seeds: of initialisation and of the order of the text.
    rates: the peak learning rate of each seed.
    folder: where trainings are kept, and go on from when interrupted.
    corpus: the text.
    dense: the dense model.
  """

  def __init__(
    self,
    rung: Rung,
    corpus: data.Corpus,
    *,
    tokens_per_parameter: float,
    seeds: Sequence[int],
    folder: Path,
    rates: Sequence[float] | None = None,
  ):
    """`rates` None is the rung's for all seeds."""
    self.rung, self.seeds, self.folder = rung, list(seeds), folder
    self.budget = Budget(rung, tokens_per_parameter)
    self.rates = [rung.learning_rate] * len(self.seeds) if rates is None else list(rates)
    self.corpus = corpus
    self.dense = rung.config()
    self._trained: dict[str, Subject] = {}

  @functools.cached_property
  def tokenizer(self) -> BPETokenizer:
    """Byte pairs of a sample of the training split."""
    sample = self.corpus.select(split="train").limited(SAMPLE_BYTES)
    texts = (document.text for document in sample)
    return data.tokenizers.train_bpe(texts, self.rung.vocab)

  def fresh(self, config: TransformerConfig) -> Subject:
    """A model of each seed at initialisation."""
    return fresh(config, self.seeds)

  def each(self, make: Callable[[Subject, Key], Subject], subject: Subject) -> Subject:
    """What `make` gives for the model of each seed."""
    configs = []

    def one(params, key: Key):
      made = make(dataclasses.replace(subject, params=params), key)
      configs.append(made.config)
      return made.params

    params = jax.vmap(one)(subject.params, keys(self.seeds))
    return Subject(configs[0], params)

  def trained(self, name: str, run: Run) -> Subject:
    """The models of a run after training, in the folder `trainings/name`."""
    if name not in self._trained:
      objective = run.objective or next_token(run.subject.module)
      orders = training.Orders(self.loaders(run.order), self.seeds, self.steps(run))
      train = functools.partial(training.train, after=run.after, watch=run.watch)
      start, folder = run.subject.params, self._place(name)
      params = train(objective, start, orders, self.rates, self.seeds, folder)
      self._trained[name] = dataclasses.replace(run.subject, params=params)
    return self._trained[name]

  def history(self, name: str, run: Run) -> list[Row]:
    """A row every so often while a run trained: "step", "losses" by seed, and what it watched.

    All are means over the `training.PER_CALL` steps before.
    """
    steps = self.steps(run)
    at = lambda call: min(call * training.PER_CALL, steps)
    rows = files.read_rows(self._place(name) / files.METRICS)
    return [{**row, "step": at(row["step"])} for row in rows]

  def _place(self, name: str) -> Path:
    return self.folder / "trainings" / name

  def dense_after(self, part: float) -> Subject:
    """The dense models after `part` of the budget, at the end of a schedule of their own."""
    start = Run(self.fresh(self.dense), spending=Spending(spent=1 - part))
    return self.trained(f"dense-{part:g}", start)

  def tasks(self, name: str, measure: Callable[[], list[Row]]) -> dict[str, Callable[[], Row]]:
    """A task for the row of each seed; `measure` gives those of all, once one is asked for."""
    rows = functools.cache(measure)
    row = lambda index: {"seed": self.seeds[index], **rows()[index]}
    places = enumerate(self.seeds)
    return {f"{name} seed={seed}": functools.partial(row, index) for index, seed in places}

  def steps(self, run: Run) -> int:
    """Steps of a run within the budget."""
    return self.budget.steps(run.subject.config, run.spending)

  def held_out(self, rows: int, length: int | None = None) -> HeldOut:
    """Rows of held-out text, of the length of training or another."""
    return held_out(
      self.corpus,
      self.tokenizer,
      rows=rows,
      length=length or self.rung.length,
      batch_size=self.rung.batch,
    )

  def loaders(self, order: int) -> dict[int, data.Loader]:
    """The batches of each seed, in one of its orders of the training split."""
    load = functools.partial(
      data.loader,
      self.corpus,
      self.tokenizer,
      batch_size=self.rung.batch,
      length=self.rung.length,
    )
    return {seed: load(seed=seed + ORDERS * order) for seed in self.seeds}
