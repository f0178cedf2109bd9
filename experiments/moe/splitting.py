"""What does a pretrained model pay when a token visits a part of its hidden units, chosen how?

  scripts/run splitting                                                           (5 minutes)
  scripts/run splitting --config.ways=all --config.steps=100 --config.seeds=4 --config.rates=1,4

Every MLP of SmolLM2-135M is split into 8 experts (LLaMA-MoE, arXiv 2406.16554), in ways that
differ in which hidden unit goes where: "random"; "clusters" of gate rows that point alike; "graph",
units that are active for the same tokens; "gradient", units that matter to the loss of the same
texts; "residual", a random split of 7/8 beside the units that matter to most texts, which every
token visits; "inner", experts that share units. Texts are groups of training rows whose mean
embeddings are alike, one for each expert.

Perplexity on held-out text is that of k experts of all, the k of training and others; what is
shared counts as one of the k. Routers start at random and gates sum to the number of experts.
Then all is trained, in equal steps over equal batches. Differences to the random split are paired
by seed; a seed draws routers, the order of the text, and the random splits.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from effjax import moe
from effjax.core import trees
from effjax.core.typing import Int, Key, Size
from effjax.layers import capture
from effjax.moe import splitting
from effjax.moe.splitting import Parts, Way
from effjax.moe.units import Site
from effjax.train import next_token, perplexity
from effjax.train import workdir as files
from experiments import harness
from experiments.lab import provenance
from experiments.lab.plots import LINEAR, LOG, Axis, Line, Panel, Series, differences
from experiments.lab.subject import Subject, costs
from experiments.lab.verdicts import Verdict
from experiments.moe import continued
from experiments.moe.continued import BEFORE, NATS
from experiments.peft.methods import Method
from experiments.peft.tasks import Continuing
from experiments.peft.trials import Trials

DENSE, RANDOM, RESIDUAL, INNER = "dense", "random", "residual", "inner"
WAYS = (RANDOM, "clusters", "graph", "gradient", RESIDUAL, INNER)
SAME = 1e-5  # of the largest logit
RATE = 1e-4


@dataclasses.dataclass
class Config:
  """What is split, and how it is trained.

  Attributes:
    model: a name or path for `models.load`, or a preset such as "tiny", which starts at random.
    text: a source of `data.text`.
    ways: of the six, comma-separated, or all; the random one is always there.
    experts, top_k: E, and the k of training.
    ks: other numbers of experts, comma-separated, with which perplexity is measured, besides all.
    calibration: rows of training text for statistics, a multiple of the experts.
    rows, length, batch: rows that are held out; tokens of a row; rows of a step.
    steps: of a run.
    rates: what the peak learning rate of 1e-4 is multiplied by, comma-separated.
    seeds: how many.
  """

  model: str = "smollm2-135m"
  text: str = "pydoc"
  ways: str = "random,clusters,graph,gradient"
  experts: int = 8
  top_k: int = 2
  ks: str = "4"
  calibration: int = 16
  rows: int = 4
  length: int = 64
  batch: int = 2
  steps: int = 6
  rates: str = "1"
  seeds: int = 2


def run(config: Config, workdir: str) -> list[harness.Row]:
  """A line a way; writes `metrics.jsonl`, `result.csv`, `plot.png` and the text's origin."""
  chosen = harness.chosen(config.ways, WAYS, what="way")
  multiples = harness.numbers("rates", config.rates, least=0)
  _check(config)
  given = f"{config.top_k},{config.ks},{config.experts}"
  ks = harness.numbers("ks", given, int, least=2, most=config.experts)
  folder = files.claim(workdir, config, free=("ways", "seeds"))
  sizes: Any = {"rows": config.rows, "length": config.length, "batch": config.batch}
  task = Split(config.model, config.text, ks=ks, top_k=config.top_k, **sizes)
  provenance.write(folder, task.corpus)
  known = variants(config, Statistics(task, config))
  compared = [known[name] for name in dict.fromkeys([RANDOM, *chosen])]
  options: Any = {"multiples": multiples, "seeds": config.seeds, "folder": folder}
  before = functools.partial(_before, task, config.length)
  planned = continued.planned(Trials(task, config.steps), compared, before, **options)
  dense = {DENSE: functools.partial(_dense, task, config.length)}
  harness.compute(folder, dense | planned, label="runs")
  measured = files.read_rows(folder / files.METRICS)
  rows = summary(measured)
  harness.plot(folder, panels)
  harness.finish(folder, rows, columns(rows), claims(measured))
  harness.write_csv(folder, rows)
  return rows


def _check(config: Config) -> None:
  for name in ("seeds", "steps"):
    if (given := getattr(config, name)) < 1:
      raise ValueError(f"{name}={given}; allowed: from 1")
  if not 2 <= config.top_k <= config.experts:
    raise ValueError(f"top_k={config.top_k}; allowed: 2 … experts={config.experts}")
  if config.calibration < 1 or config.calibration % config.experts:
    given = f"calibration={config.calibration}"
    raise ValueError(f"{given}; allowed: multiples of experts={config.experts}")


class Split(Continuing):
  """Nats a token of the text that was held out, with several numbers of experts."""

  def __init__(self, model: str, text: str, *, ks: list[int], top_k: int, **sizes: Any):
    super().__init__(model, text, **sizes)
    self.ks, self._top_k = ks, top_k

  def score(self, method: Method, subject: Subject) -> harness.Row:
    paid = lambda k: Continuing.score(self, method, with_k(subject, k))[NATS]
    found = {f"k={k}": paid(k) for k in self.ks}
    return {NATS: found[f"k={self._top_k}"], **found}


class Statistics:
  """What ways to split look at, of some rows of the training text; computed when asked for."""

  def __init__(self, task: Split, config: Config):
    self._task, self._config = task, config

  @functools.cached_property
  def _rows(self) -> dict[str, np.ndarray]:
    method = Method("calibration", "", 0.0, lambda config, params, key: (config, params))
    batches = self._task.batches(method, self._task.subject.params, seed=0)
    count = -(-self._config.calibration // self._config.batch)
    drawn = [next(batches) for _ in range(count)]
    joined = jax.tree.map(lambda *x: np.concatenate(x), *drawn)
    return {name: x[: self._config.calibration] for name, x in joined.items()}

  @functools.cached_property
  def co_activation(self) -> dict[str, Any]:
    subject, rows = self._task.subject, self._rows
    read = {name: x for name, x in rows.items() if name not in ("targets", "weights")}
    options: Any = {"reduce": splitting.co_activation, "select": r"ffn/down$"}
    return capture(subject.module, subject.params, _parts(read, self._config.batch), **options)

  @functools.cached_property
  def importance(self) -> list[dict[str, Any]]:
    """Of each group of rows that are alike."""
    subject, experts = self._task.subject, self._config.experts
    table = trees.select(subject.params, r"^embed/embedding$")["embed/embedding"]
    vectors = np.asarray(table)[self._rows["tokens"]].mean(axis=1)
    group = splitting.equal_clusters(vectors @ vectors.T, experts)
    objective = next_token(subject.module)
    rows = [{name: x[group == g] for name, x in self._rows.items()} for g in range(experts)]
    return [splitting.importance(objective, subject.params, [each]) for each in rows]


def _parts(batch: Mapping[str, np.ndarray], rows: int) -> list[dict[str, np.ndarray]]:
  count = len(batch["tokens"])
  cuts = range(0, count - count % rows or count, rows)
  return [{name: x[start : start + rows] for name, x in batch.items()} for start in cuts]


class Once:
  """A way to split that goes through each layer once, from one key, whatever it is given."""

  def __init__(self, way: Any):
    self._way, self._found = way, dict[int, Parts]()

  def __call__(self, site: Site, among: Int[np.ndarray, "F"], experts: Size, key: Key) -> Parts:
    if site.index not in self._found:
      self._found[site.index] = self._way()(site, among, experts, jax.random.key(0))
    return self._found[site.index]


def variants(config: Config, statistics: Statistics) -> dict[str, Method]:
  """Name → what is trained."""
  inner = lambda: splitting.SharingInner(statistics.importance)

  def residual(site: Site, among: Any, experts: Size, key: Key) -> Parts:
    shared = len(among) // (experts + 1)
    way = splitting.Residual(splitting.Random(), statistics.importance, shared)
    return way(site, among, experts, key)

  ways: dict[str, Way] = {
    RANDOM: splitting.Random(),
    "clusters": Once(splitting.Clusters),
    "graph": Once(lambda: splitting.Graph(statistics.co_activation)),
    "gradient": Once(lambda: splitting.Important(statistics.importance)),
    RESIDUAL: residual,
    INNER: Once(inner),
  }

  def split(name: str):
    apart = name == RESIDUAL
    options: Any = {"experts": config.experts - apart, "top_k": config.top_k - apart}
    return lambda shape, params, key: moe.split_ffn(shape, params, key, by=ways[name], **options)

  return {name: Method(name, "full", RATE, split(name)) for name in ways}


def with_k(subject: Subject, k: int) -> Subject:
  """The model with k experts for each token, of which what is shared is one."""

  def change(_: int, spec):
    if not isinstance(spec.ffn, moe.MoE):
      return spec
    router = spec.ffn.router.clone(top_k=k - (spec.ffn.shared is not None))
    return dataclasses.replace(spec, ffn=spec.ffn.clone(router=router))

  return subject.with_layers(change)


def _all_on(subject: Subject, experts: int) -> Subject:
  """The model with all experts, and gates of one: those of routers that know no difference."""
  everyone = with_k(subject, experts)
  zero = lambda path, x: jax.numpy.zeros_like(x)
  return Subject(everyone.config, trees.update(everyone.params, r"ffn/router/kernel$", zero))


def _dense(task: Split, length: int) -> harness.Row:
  found = Continuing.score(task, _as_it_is(), task.subject)
  return {"variant": DENSE, "kind": BEFORE, **costs(task.subject, length), NATS: found[NATS]}


def _as_it_is() -> Method:
  return Method(DENSE, "", 0.0, lambda config, params, key: (config, params))


def _before(task: Split, length: int, variant: Method) -> harness.Row:
  """What it costs, how far all experts are from the dense model, and what it pays."""
  subject = variant(task.subject, jax.random.key(0))
  batch = task.held_out.batches[0]
  everyone = _all_on(subject, max(task.ks))
  dense, own = (continued.logits(each, batch) for each in (task.subject, everyone))
  return {
    **costs(subject, length),
    "logits off": float(np.abs(own - dense).max() / np.abs(dense).max()),
    **task.score(variant, subject),
  }


def numbers_of(rows: list[harness.Row]) -> list[int]:
  """The numbers of experts with which perplexity was measured."""
  found = {int(name[2:]) for row in rows for name in row if name.startswith("k=")}
  return sorted(found)


def columns(rows: list[harness.Row]) -> dict[str, str]:
  """The columns of the table and their formats."""
  ks = sorted({int(name.split("=")[1]) for row in rows for name in row if "k=" in name})
  paid = {f"{when} k={k}": ",.1f" for when in ("before", "after") for k in ks}
  first = {"variant": "", "parameters": ",d", "active": ",d", "logits off": ".1e"}
  return first | paid | {"rate": ".1e", "over": "+.4f", "± 95 %": ".4f"}


def summary(measured: list[harness.Row]) -> list[harness.Row]:
  """A line a way, with perplexities; the dense model's stands in every column of its own."""
  ks = numbers_of(measured)
  (dense,) = continued.of(measured, DENSE, BEFORE)
  lines = [{**dense, **{f"before k={k}": perplexity(dense[NATS]) for k in ks[-1:]}}]
  for name in continued.names(measured):
    made = continued.line(measured, name, RANDOM)
    for k in ks:
      (after,) = continued.seeds_of(measured, name, column=f"k={k}")
      made[f"before k={k}"] = perplexity(made[f"k={k}"])
      made[f"after k={k}"] = perplexity(sum(after) / len(after))
    lines.append({key: value for key, value in made.items() if not key.startswith("k=")})
  return lines


def claims(measured: list[harness.Row]) -> dict[str, bool | Verdict]:
  """Of which ways all experts are the dense model, whether training helps, which way is best."""
  said: dict[str, bool | Verdict] = {}
  for name in continued.names(measured):
    (before,) = continued.of(measured, name, BEFORE)
    if name != INNER:
      said[f"{name}: all experts with gates of one are the dense model to 1e-5 of a logit"] = (
        before["logits off"] <= SAME
      )
    said[f"{name} is better than before training"] = continued.learned(measured, name)
  for name in continued.names(measured):
    if name != RANDOM:
      said[f"{name} is better than random after training"] = continued.better(
        measured, name, RANDOM
      )
  return said


def panels(measured: list[harness.Row]) -> list[Panel]:
  """Perplexity by the number of experts, before and after; the verdicts."""
  ks, (dense,) = numbers_of(measured), continued.of(measured, DENSE, BEFORE)
  line = [Line("dense", y=perplexity(dense[NATS]))]
  rows, shown = summary(measured)[1:], []
  for when in ("before", "after"):
    series = [Series(row["variant"], ks, [row[f"{when} k={k}"] for k in ks]) for row in rows]
    experts = Axis("experts for each token", LINEAR, {k: str(k) for k in ks})
    shown.append(Panel(f"{when} training", experts, Axis("perplexity", LOG), series, line))
  against = {text: found for text, found in claims(measured).items() if "than random" in text}
  return shown + differences("Verdicts", "nats a token beyond the random split", against)


if __name__ == "__main__":
  harness.main(run, Config())
