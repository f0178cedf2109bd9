"""Which hash should choose a token's expert? Every row of table 3 of Hash Layers, on one text.

  scripts/run hash_layers                                          (about 4 minutes)
  scripts/run hash_layers --config.rows=dense,balanced,random      (some; finished rows stay)

Roller et al. (arXiv 2106.04426) hold hash layers against one another on Reddit: a feed-forward
layer becomes 64 experts, of which a table chooses one for each token, or several layers become 16
each. Here small models learn on as many tokens of the same text each, over several seeds, by
default for a fraction of the tokens that a verdict wants. All rows have the dense model's FLOPs,
and all with hash layers about as many parameters; of perplexities only the order is expected to
carry over.

"future predicted" asks the dense model of the same seed, after its training. Its forward passes are
not counted. "MultiHash", which is not in the table, has four hashes choose the segments of a layer.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from effjax import data
from effjax.core.numerics import cross_entropy
from effjax.core.typing import Array, Key, Params
from effjax.layers.forward import forward, sown_values
from effjax.models import Transformer, TransformerConfig
from effjax.moe import Hash, MoE, MultiHash, hash_tables
from effjax.train import next_token, perplexity
from effjax.train import workdir as files
from experiments import harness
from experiments.lab import budget, provenance, training
from experiments.lab.budget import Spending
from experiments.lab.held_out import HeldOut
from experiments.lab.plots import LOG, Axis, Line, Panel, Series, differences
from experiments.lab.sizes import LADDER, Rung, parameters
from experiments.lab.study import Run, Study
from experiments.lab.subject import Subject
from experiments.lab.verdicts import Verdict, alike, deviation, paired, predicts_better

# Below the ladder, so that a study of all rows ends within an hour; it learns at the rate of the
# two sizes above it, which the sweep found to be the same.
SMALLEST = Rung("0.05M", 32, 4, 2, batch=8, learning_rate=8e-3)
SLOWER = 1.5  # a step of 64 experts against a dense one, of small models: most is the optimiser's
DENSE = "dense"
BUCKETS = 2**16  # of bigrams
SEGMENTS = 4  # of a MultiHash
COUNTED = 128  # batches whose ids are counted
COUNTING = 1  # the order of the text in which they are read
MARGIN = 0.015  # nats: half of what the paper finds between balanced and clustered tables

PUBLISHED = {  # perplexity on the validation set
  DENSE: 24.9,
  "balanced": 23.16,
  "random": 23.22,
  "clustering": 23.9,
  "dispersed": 23.17,
  "position": 25.07,
  "bigram": 24.19,
  "previous": 24.16,
  "predicted": 25.02,
  "oracle": 1.97,
  "layers, same": 23.74,
  "layers, different": 23.21,
}
MULTI = "MultiHash"
NAMES = {name.replace(",", "").replace(" ", "-"): name for name in (*PUBLISHED, MULTI)}
BY = {name: name for name in ("position", "bigram", "previous", "predicted")} | {"oracle": "next"}


@dataclasses.dataclass
class Config:
  """What is trained and measured.

  Attributes:
    rows: rows of the table, comma-separated, or "all".
    text: a source of `data.text`; its training split trains, its validation split measures.
    seeds: of each row.
    tokens_per_parameter: of every run, a parameter of the dense model; 20 for a verdict.
    minutes: in which all runs are to end on two cores; it decides their size.
    experts: of the one hash layer; where every layer is one they have as many together.
    held_out: rows of held-out text.
  """

  rows: str = "all"
  text: str = "libraries"
  seeds: int = 4
  tokens_per_parameter: float = 1.0
  minutes: float = 2.0
  experts: int = 64
  held_out: int = 128


def run(config: Config, workdir: str) -> list[harness.Row]:
  """A row for each hash and seed; writes `metrics.jsonl`, `result.csv`, `plot.png`."""
  chosen = harness.chosen(config.rows, NAMES, what="row")
  given = config.tokens_per_parameter
  rung = budget.largest(
    len(NAMES) * config.seeds,
    tokens_per_parameter=given,
    minutes=config.minutes / SLOWER,
    ladder=(SMALLEST, *LADDER),
  )
  training.use_every_core()
  folder = files.claim(workdir, config, free=("rows",))
  corpus, seeds = data.text(config.text), range(config.seeds)
  provenance.write(folder, corpus)
  study = Study(rung, corpus, tokens_per_parameter=given, seeds=seeds, folder=folder)
  hashes = Hashes(study, config.experts)
  text = study.held_out(config.held_out)
  tasks: dict[str, Callable[[], harness.Row]] = {}
  for name in chosen:
    tasks |= study.tasks(name, functools.partial(hashes.rows, NAMES[name], text))
  rows = harness.compute(folder, tasks, label="runs")
  harness.plot(folder, panels)
  harness.write_csv(folder, rows)
  columns = {"row": "", "perplexity": ".2f", "±": ".2f", "− dense, nats": "+.4f", "± 95 %": ".4f"}
  columns |= {"place": "d", "published": ".2f", "its place": "d"}
  columns |= {"max_load": ".2f", "entropy": ".3f", "M parameters": ".2f"}
  print(f"\n{budget.title(rung, given, config.seeds)}")
  harness.finish(folder, summarize(rows), columns, claims(rows))
  return rows


class Hashes:
  """The models of every row in a study, and what they are worth."""

  def __init__(self, study: Study, experts: int):
    self.study, self.experts = study, experts

  def rows(self, name: str, text: HeldOut) -> list[harness.Row]:
    """Trains one row of the table, and reads the held-out text with each seed."""
    subject = self.trained(name)
    common = {"row": name, "parameters": parameters(subject.config)}
    return [{**common, **found} for found in measured(subject, self.teacher(name), text)]

  def trained(self, name: str) -> Subject:
    """The models of a row after training."""
    subject, teacher = self.start(name), self.teacher(name)
    objective = None
    if teacher is not None:
      objective = Partial(Told(subject.module, teacher.module), teacher.params)
    return self.study.trained(name, Run(subject, objective, Spending(equal="tokens")))

  def teacher(self, name: str) -> Subject | None:
    """The models whose predictions those of a row are told."""
    return self.trained(DENSE) if name == "predicted" else None

  def start(self, name: str) -> Subject:
    """The models of a row at initialisation, with the tables of each seed."""
    if name == DENSE:
      return self.study.fresh(self.study.dense)
    subject = self.study.fresh(with_hashes(self.study.dense, name, self.experts))
    tables = [self.tables(name, index) for index in range(len(self.study.seeds))]
    put = lambda params, tables: hash_tables.put(subject.config, params, tables)
    stacked = jax.tree.map(lambda *x: np.stack(x), *tables)
    return dataclasses.replace(subject, params=jax.vmap(put)(subject.params, stacked))

  def tables(self, name: str, index: int) -> Any:
    """The table of the hash layers of a row, or one for each, for the seed at `index`."""
    seed, all_layers = self.study.seeds[index], len(self.study.dense.layers)
    one, each = {"experts": self.experts}, {"experts": self.experts // all_layers}
    drawn = lambda count, experts: [
      hash_tables.balanced(self.counts, seed=count * seed + n, **experts) for n in range(count)
    ]
    match name:
      case "random":
        return hash_tables.random(self.study.rung.vocab, seed=seed, **one)
      case "bigram":
        return hash_tables.random(BUCKETS, seed=seed, **one)
      case "clustering" | "dispersed":
        embeddings = self.trained(DENSE).params["embed"]["embedding"][index]
        clusters = hash_tables.clustered(embeddings, seed=seed, **one)
        if name == "clustering":
          return clusters
        return hash_tables.dispersed(clusters, seed=seed, **one)
      case "position":
        return hash_tables.position(self.study.rung.length, **one)
      case "layers, same":
        return hash_tables.balanced(self.counts, **each)
      case "layers, different":
        return drawn(all_layers, each)
      case "MultiHash":
        return np.stack(drawn(SEGMENTS, one), axis=-1)
    return hash_tables.balanced(self.counts, **one)

  @functools.cached_property
  def counts(self) -> np.ndarray:
    """How often each id occurs in some of the training split, in an order of its own."""
    loader = self.study.loaders(COUNTING)[self.study.seeds[0]]
    ids = np.concatenate([next(loader)["tokens"].reshape(-1) for _ in range(COUNTED)])
    return np.bincount(ids, minlength=self.study.rung.vocab)


@dataclasses.dataclass(frozen=True)
class Told:
  """Next-token prediction by a model that is told what another one predicts."""

  module: Transformer
  teacher: Transformer

  def __call__(self, params: Params, model: Params, batch: dict, rng: Key | None):
    return next_token(self.module)(model, told(batch, self.teacher, params), rng)


def told(batch: dict, teacher: Transformer, params: Params) -> dict:
  """A batch with the predictions of another model."""
  return batch | {"predicted": hash_tables.predicted_ids(teacher, params, batch)}


def with_hashes(config: TransformerConfig, name: str, experts: int) -> TransformerConfig:
  """The dense model with the hash layers of a row: one in the middle, or all of them."""
  vocab, count = config.vocab_size, len(config.layers)
  every = name.startswith("layers")
  entries = {"bigram": BUCKETS, "position": config.context}.get(name, vocab)
  router = Hash(experts // count if every else experts, entries, by=BY.get(name, "token"))

  def hashed(mlp: Any) -> Any:
    if name == MULTI:  # two matrices, of the size of the three of a gated layer
      return MultiHash(router.clone(hashes=SEGMENTS), mlp.width * 3 // 2)
    return MoE(router, mlp)

  layers = [
    dataclasses.replace(spec, ffn=hashed(spec.ffn)) if every or index == count // 2 else spec
    for index, spec in enumerate(config.layers)
  ]
  return dataclasses.replace(config, layers=tuple(layers), family=None)


def measured(subject: Subject, teacher: Subject | None, text: HeldOut) -> list[harness.Row]:
  """What the model of each seed pays for held-out text, and how even its hash layers are."""
  other = (None, None) if teacher is None else (teacher.module, teacher.params)
  found = [_measured(subject.module, other[0], subject.params, other[1], x) for x in text.batches]
  nats = np.sum([np.asarray(nats, np.float64) for nats, _ in found], axis=0)
  loads = np.mean([loads for _, loads in found], axis=0)  # [seeds, layers, E]
  each = zip(nats.tolist(), loads, strict=True)
  return [{**text.paid(paid), **(evenness(load) if load.size else {})} for paid, load in each]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measured(module, teacher, params: Params, teachers: Params | None, batch: dict) -> Any:
  def one(params: Params, teachers: Params | None) -> tuple[Array, Array]:
    given = batch if teacher is None or teachers is None else told(batch, teacher, teachers)
    logits, sown = forward(module, params, given)
    nats = cross_entropy(logits, batch["targets"], batch["weights"]).sum()
    loads = [x for name, x in sown_values(sown).items() if name.endswith("/load")]
    rows = [x.reshape(-1, x.shape[-1]) for x in loads] or [jnp.zeros((0, 0))]
    return nats, jnp.concatenate(rows)

  return jax.vmap(one)(params, teachers)


def evenness(loads: np.ndarray) -> harness.Row:
  """The busiest expert's load over the mean one's, and entropy over its bound: means of layers."""
  experts = loads.shape[-1]
  entropy = -(loads * np.log(np.where(loads > 0, loads, 1))).sum(axis=-1)
  return {
    "max_load": float(experts * loads.max(axis=-1).mean()),
    "entropy": float(entropy.mean() / math.log(experts)),
  }


def summarize(rows: list[harness.Row]) -> list[harness.Row]:
  """A line for each row of the table: means over seeds, the difference to dense, places."""
  nll = by_row(rows)
  ours = places({name: statistics.mean(x) for name, x in nll.items() if name in PUBLISHED})
  theirs = places({name: PUBLISHED[name] for name in ours})
  table = []
  for name, values in nll.items():
    seeds = [row for row in rows if row["row"] == name]
    line = {"row": name, "perplexity": statistics.mean(map(perplexity, values))}
    line["±"] = deviation(list(map(perplexity, values)))
    if name != DENSE and DENSE in nll and np.isfinite([values, nll[DENSE]]).all():
      apart = paired(values, nll[DENSE])
      line |= {"− dense, nats": apart.mean, "± 95 %": apart.reach}
    line |= {
      "place": ours.get(name),
      "published": PUBLISHED.get(name),
      "its place": theirs.get(name),
    }
    if "max_load" in seeds[0]:
      line |= {key: statistics.mean(row[key] for row in seeds) for key in ("max_load", "entropy")}
    table.append(line | {"M parameters": seeds[0]["parameters"] / 1e6})
  return table


def by_row(rows: list[harness.Row]) -> dict[str, list[float]]:
  """Row of the table → nats a token of each seed."""
  nll: dict[str, list[float]] = {}
  for row in rows:
    nll.setdefault(row["row"], []).append(row["nll"])
  return nll


def places(values: dict[str, float]) -> dict[str, int]:
  """Name → its place among values, the least being 1."""
  return {name: place for place, name in enumerate(sorted(values, key=values.__getitem__), 1)}


def claims(rows: list[harness.Row]) -> dict[str, Verdict]:
  """The published order, neighbour by neighbour, of the rows that were measured."""
  nll, found = by_row(rows), {}

  def better(a: str, b: str) -> None:
    if a in nll and b in nll:
      found[f"{a} predicts better than {b}"] = predicts_better(nll[a], nll[b])

  def even(a: str, b: str) -> None:
    if a in nll and b in nll and np.isfinite([nll[a], nll[b]]).all():
      found[f"{a} and {b} are within {MARGIN} nats"] = alike(nll[a], nll[b], MARGIN)

  better("oracle", "balanced")
  even("dispersed", "balanced")
  even("random", "balanced")
  better("balanced", "clustering")
  better("clustering", "previous")
  even("bigram", "previous")
  better("balanced", DENSE)
  better("bigram", DENSE)
  better("previous", DENSE)
  better(DENSE, "predicted")
  better("predicted", "position")
  better("layers, different", "layers, same")
  better("layers, same", DENSE)
  better(MULTI, DENSE)
  return found


def panels(rows: list[harness.Row]) -> list[Panel]:
  """Perplexity here and there, balance, and what verdicts judge."""
  lines = {line["row"]: line for line in summarize(rows)}
  here = lambda names: [lines[name]["perplexity"] for name in names]
  shared = [name for name in lines if name in PUBLISHED]
  hashed = [name for name in lines if "max_load" in lines[name]]
  spread = [lines[name]["±"] for name in shared]
  published = [PUBLISHED[name] for name in shared]
  bars = "standard deviation over seeds"
  dense = lines.get(DENSE)
  bounds = [] if dense is None else [Line("the dense model", y=dense["perplexity"])]
  loads = [lines[name]["max_load"] for name in hashed]
  return [
    Panel(
      "The order of the paper",
      Axis("perplexity in the paper, on Reddit", LOG),
      Axis("perplexity of held-out text", LOG),
      [Series("rows", published, here(shared), spread, joined=False, names=shared)],
      bounds,
      bars=bars,
    ),
    Panel(
      "Balance and perplexity",
      Axis("load of the busiest expert, in means", LOG),
      Axis("perplexity of held-out text", LOG),
      [Series("rows", loads, here(hashed), joined=False, names=hashed)],
      bounds,
    ),
    *differences("What the verdicts are about", "difference, nats a token", claims(rows)),
  ]


if __name__ == "__main__":
  harness.main(run, Config())
