"""Short trainings of a small model, all at the FLOPs of one dense baseline.

A step of plain training costs three forward passes a token (forward, and twice that backward,
Kaplan et al., arXiv 2001.08361, section 2.1); where only factors beside frozen matrices train the
backward pass to the matrices falls away and two remain; a teacher costs one of its own.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from effjax import cost, data
from effjax.models import Transformer, TransformerConfig, presets
from effjax.train import OptimizerConfig, init_state, make_optimizer, make_train_step, next_token
from effjax.train.objectives import Objective
from experiments import harness
from experiments.lab.subject import Subject, init


@dataclasses.dataclass(frozen=True)
class Run:
  """What a short run trains.

  Attributes:
    subject: where it starts.
    objective: None is next-token prediction.
    spent: the part of the budget that its start has taken.
    passes: forward passes that a token of training costs.
    extra_flops: FLOPs a token besides, such as a teacher's.
    learning_rate: its peak.
  """

  subject: Subject
  objective: Objective | None = None
  spent: float = 0.0
  passes: float = 3.0
  extra_flops: float = 0.0
  learning_rate: float = 5e-3


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of the small model and its runs: `steps` are those of the dense baseline."""

  width: int
  layers: int
  heads: int
  vocab: int
  length: int
  batch: int
  steps: int
  text: str


class Lab:
  """Text, tokenizer and dense starts that the short runs share; what is trained is kept."""

  def __init__(self, shape: Shape):
    self.shape = shape
    self.corpus = data.text(shape.text)
    sample = (document.text for document in self.corpus.select(split="train").limited(1_000_000))
    self.tokenizer = data.tokenizers.train_bpe(sample, shape.vocab)
    self.dense = self.config(shape.layers)
    self._trained: dict[tuple[float, int], Subject] = {}
    self._steps: dict = {}

  def config(self, layers: int) -> TransformerConfig:
    """The dense shape with another number of layers."""
    s = self.shape
    return presets.llama(
      self.tokenizer.vocab_size, s.width, layers, s.heads, s.heads, context=s.length
    )

  def fresh(self, config: TransformerConfig, seed: int) -> Subject:
    """A subject at initialisation."""
    return Subject(config, init(Transformer(config), jax.random.key(seed)))

  def dense_after(self, part: float, seed: int) -> Subject:
    """The dense model after `part` of the budget, trained once and kept."""
    if (part, seed) not in self._trained:
      run = Run(self.fresh(self.dense, seed), spent=1 - part)
      self._trained[part, seed] = self.train(run, seed, "dense start")[0]
    return self._trained[part, seed]

  def keep(self, part: float, seed: int, subject: Subject) -> None:
    """Gives what `dense_after` would train."""
    self._trained[part, seed] = subject

  def train(
    self, run: Run, seed: int, label: str, steps: int | None = None
  ) -> tuple[Subject, list[list[float]]]:
    """The subject after training, and its [step, loss] curve; `steps` None is the budget's rest."""
    shape, subject = self.shape, run.subject
    steps = self.steps(run) if steps is None else steps
    optimizer, step = self._step(run, steps, label)
    state = init_state(jax.tree.map(jnp.copy, subject.params), optimizer)
    batches = data.loader(
      self.corpus, self.tokenizer, batch_size=shape.batch, length=shape.length, seed=seed
    )
    curve, rng = [], jax.random.key(seed)
    for number in harness.progress(range(1, steps + 1), f"  {label} seed {seed}", leave=False):
      state, metrics = step(state, next(batches), rng)
      if number % 10 == 0 or number == steps:
        curve.append([number, float(metrics.get("nll", metrics["loss"]))])
    return dataclasses.replace(subject, params=state.params), curve

  def steps(self, run: Run) -> int:
    """Steps of a run that make its FLOPs those that are left of the dense baseline's."""
    forward = functools.partial(cost.flops, length=self.shape.length)
    budget = 3.0 * forward(self.dense) * self.shape.steps * (1 - run.spent)
    return max(1, round(budget / (run.passes * forward(run.subject.config) + run.extra_flops)))

  def validation(self, rows: int, length: int | None = None) -> list[dict[str, np.ndarray]]:
    """Batches of held-out text, at most `rows` rows in all, of the runs' length or another."""
    shape = self.shape
    batches = data.loader(
      self.corpus,
      self.tokenizer,
      batch_size=shape.batch,
      length=length or shape.length,
      seed=0,
      split="validation",
    )
    return [next(batches) for _ in range(max(1, rows // shape.batch))]

  def _step(self, run: Run, steps: int, label: str):
    """Optimiser and jitted step, one for all seeds of a technique; an objective is a seed's own."""
    kind = (label, run.subject.config, steps)
    if kind not in self._steps or run.objective is not None:
      config = OptimizerConfig(
        learning_rate=run.learning_rate, warmup=max(1, steps // 10), steps=steps
      )
      optimizer = make_optimizer(config)
      objective = run.objective or next_token(run.subject.module)
      self._steps[kind] = optimizer, make_train_step(objective, optimizer)
    return self._steps[kind]
