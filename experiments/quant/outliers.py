"""Where are the outlier features, and from which size on is it worth to keep them out of integers?

  scripts/run outliers                              (5 minutes of processor time)
  scripts/run outliers --config.model=gemma3-270m --workdir=runs/outliers_gemma

LLM.int8() (arXiv 2208.07339) multiplies a feature apart where any token has |x| ≥ 6 in it, since a
few such features spoil the scale of all others. First the largest |x| of each feature that goes
into a linear layer is taken, layer by layer, over held-out text. Then all linear layers multiply in
int8 with each threshold in turn; 0 keeps nothing apart. The share of features is that of a call,
one row of text, on average. The token table stays as it is.

Models this small have few outliers in what their norms give, so they are planted: of some channels
the gain of each norm grows by a factor, and their rows in the matrices that follow shrink by it.
With powers of two no number of the model in float32 changes. Whoever rounds activations then meets
large features; whoever rounds matrices small rows, which the paper's method keeps exactly ("exact
rows"), and bitsandbytes takes from the rounded matrix.

Measured on 2,048 tokens (`results/outliers`), as ratios to float32's perplexity, of which
differences of half a percent mean little. SmolLM2-135M has its outliers inside of the feed-forward
layers: into "down" go up to 3,304, and in each of the 30 layers some features from 6 on, 134 of
1,536 on average. What norms give to attention holds one, the same feature in most of 19 layers.
Nothing kept apart: 1.031; from 6 on, 1.3 % of features: 1.013, with exact rows 1.016; from 1 on,
25 %: 1.004, which is what rounding the weights alone costs. So a threshold helps, but 6 is too much
for a model in which nothing above 4 goes into most "gate" and "up": the promised 0.3 % does not
hold. Four channels planted 64-fold: int8 1.65, LLM.int8() 1.058, with exact rows 1.041; 8-fold:
1.035, 1.023 and 1.017.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from effjax import data, quant
from effjax.core.typing import PyTree
from effjax.layers import capture, reductions, stack
from effjax.layers.reductions import Reduction
from effjax.train import perplexity
from effjax.train import workdir as files
from experiments import harness
from experiments.lab import provenance
from experiments.lab.held_out import HeldOut, held_out
from experiments.lab.plots import LOG, Axis, Line, Panel, Series
from experiments.lab.subject import Subject, load, token_nll
from experiments.quant.planting import planted
from experiments.quant.schemes import BASELINE, LINEAR

PUBLISHED, CLOSE = 6.0, 1.003  # the paper's threshold, and most that perplexity may grow with it
OFTEN = 0.25  # of the layers, in which the paper calls a feature an outlier
PLACES = {  # the layer whose input it is → in words
  "query": "query, key, value",
  "out": "attention's output",
  "up": "gate, up",
  "down": "down",
}
WEIGHTS, INTEGERS = "int8 weights alone", "int8"
APART, EXACT = "LLM.int8()", "LLM.int8(), exact rows"
COLUMNS = {"name": "", "share": ".3%", "perplexity": ",.3f", "ratio": ".4f"}
WHERE = {
  "name": "",
  "width": "d",
  "largest": ",.1f",
  "median": ",.1f",
  "layers": "d",
  "features": ",.1f",
  "often": "d",
}


@dataclasses.dataclass
class Config:
  """What is read, and how.

  Attributes:
    model: a name or path for `models.load`, or a preset such as "tiny", which starts at random.
    text: a source of `data.text`, whose validation split is read.
    rows, length: rows that are read, and tokens of each.
    thresholds: from 0, comma-separated.
    factors: of planted outliers, from 1, comma-separated.
    channels: how many are planted, of each norm the same, evenly over the width.
  """

  model: str = "smollm2-135m"
  text: str = "libraries"
  rows: int = 4
  length: int = 512
  thresholds: str = "0,1,2,3,4,6,8,12"
  factors: str = "8,64"
  channels: int = 4


def run(config: Config, workdir: str) -> list[harness.Row]:
  """Rows of all three parts; writes `metrics.jsonl`, `result.csv`, `plot.png` to `workdir`."""
  thresholds = harness.numbers("thresholds", config.thresholds, least=0)
  factors = harness.numbers("factors", config.factors, least=1)
  folder = files.claim(workdir, config, free=("thresholds", "factors"))
  corpus = data.text(config.text)
  provenance.write(folder, corpus)
  study = Study(config, corpus, sorted({0.0, PUBLISHED, *thresholds}))
  tasks = {words: functools.partial(study.place, place) for place, words in PLACES.items()}
  for name in (BASELINE, WEIGHTS, EXACT):
    tasks[name] = functools.partial(study.row, 1.0, name, PUBLISHED)
  tasks |= {f"threshold={t:g}": functools.partial(study.row, 1.0, APART, t) for t in thresholds}
  for k in factors:
    for scheme in (BASELINE, INTEGERS, APART, EXACT):
      tasks[f"planted ×{k:g}: {scheme}"] = functools.partial(study.row, k, scheme, PUBLISHED)
  rows = compared(harness.compute(folder, tasks, label="rows"))
  harness.plot(folder, lambda measured: panels(compared(measured)))
  print("\n" + harness.table([summary(row) for row in rows if "largest" in row], WHERE))
  harness.finish(folder, [row for row in rows if "nll" in row], COLUMNS, claims(rows))
  harness.write_csv(folder, rows)
  return rows


class Study:
  """A model and its text, loaded when a row wants them."""

  def __init__(self, config: Config, corpus: data.Corpus, thresholds: Sequence[float]):
    self._config, self._corpus, self._thresholds = config, corpus, thresholds
    self._with = functools.lru_cache(maxsize=1)(self._planted)
    self._inputs = functools.cache(self._captured)

  def place(self, place: str) -> harness.Row:
    """What goes into a kind of linear layer: the largest |x| and the outlier features by layer."""
    peaks = np.stack([layer[place][0] for layer in self._inputs(1.0) if place in layer])
    outlier = peaks >= PUBLISHED
    return {
      "width": peaks.shape[1],
      "largest": peaks.max(1).tolist(),
      "features": outlier.sum(1).tolist(),
      "often": int((outlier.mean(0) >= OFTEN).sum()),
    }

  def row(self, factor: float, scheme: str, threshold: float) -> harness.Row:
    """Nats with outliers planted by a factor, 1 for none, and the share that is kept apart."""
    subject = self._with(factor)
    changed = Subject(subject.config, SCHEMES[scheme](subject.params, threshold))
    score = lambda batch: token_nll(changed.module, changed.params, batch) * batch["weights"]
    nats = sum(float(score(batch).sum()) for batch in self._text.batches)
    kept = self._share(factor, threshold) if scheme in (APART, EXACT) else None
    row = {"factor": factor, "scheme": scheme, "threshold": threshold, "share": kept}
    return row | self._text.paid(nats)

  def _share(self, factor: float, threshold: float) -> float:
    """The mean over calls of the share of features, over all linear layers."""
    found = [each for layer in self._inputs(factor) for each in layer.values()]
    shares = [shares[self._thresholds.index(threshold)] for _, shares in found]
    return float(np.average(shares, weights=[peaks.size for peaks, _ in found]))

  def _captured(self, factor: float) -> list[dict]:
    """For each layer of the model, name → the statistic of what goes into a linear layer."""
    subject, select = self._with(factor), LINEAR.replace("/kernel", "")
    options: Any = {"reduce": self._statistic, "select": select}
    found = capture(subject.module, subject.params, self._text.batches, **options)
    tree = traverse_util.unflatten_dict(jax.tree.map(np.asarray, found), sep="/")
    layers, _ = stack.split(subject.config, tree)
    return [{p[-1]: x for p, x in traverse_util.flatten_dict(layer).items()} for layer in layers]

  @functools.cached_property
  def _statistic(self) -> Reduction:
    """max |x| of each feature, and the share of outlier features with each threshold."""
    parts = (reductions.absmax, *map(quant.outliers, self._thresholds))

    def finish(found: tuple) -> tuple:
      peaks, *shares = (part.finish(x) for part, x in zip(parts, found, strict=True))
      return peaks, jnp.stack(shares, axis=-1)

    return Reduction(
      lambda x, mask: tuple(part.measure(x, mask) for part in parts),
      lambda a, b: tuple(part.combine(*both) for part, *both in zip(parts, a, b, strict=True)),
      finish,
    )

  def _planted(self, factor: float) -> Subject:
    return planted(self._loaded[0], factor, self._config.channels)

  @functools.cached_property
  def _loaded(self):
    return load(self._config.model)

  @functools.cached_property
  def _text(self) -> HeldOut:
    sizes = {"rows": self._config.rows, "length": self._config.length, "batch_size": 1}
    return held_out(self._corpus, self._loaded[1], **sizes)


def integers(method: str, params: PyTree, threshold: float) -> PyTree:
  """The linear layers in int8, with what is rounded of activations below a threshold alone."""
  return quant.quantize(params, method, targets=LINEAR, threshold=threshold)


SCHEMES: dict[str, Callable[[PyTree, float], PyTree]] = {
  BASELINE: lambda params, threshold: params,
  WEIGHTS: lambda params, threshold: quant.quantize(params, targets=LINEAR),
  INTEGERS: lambda params, threshold: integers("llmint8", params, 0),
  APART: functools.partial(integers, "llmint8"),
  EXACT: functools.partial(integers, "llmint8exact"),
}


def compared(rows: list[harness.Row]) -> list[harness.Row]:
  """Perplexities, and each over that of float32."""
  exact = next((row["nll"] for row in rows if row["name"] == BASELINE), math.nan)
  paid = lambda nll: {"perplexity": perplexity(nll), "ratio": perplexity(nll - exact)}
  return [{**row, **paid(row["nll"])} if "nll" in row else row for row in rows]


def summary(row: harness.Row) -> harness.Row:
  """Of the layers' figures the largest and the median, and in how many there are outliers."""
  layers = [count for count in row["features"] if count]
  return {
    **row,
    "largest": max(row["largest"]),
    "median": float(np.median(row["largest"])),
    "layers": len(layers),
    "features": sum(row["features"]) / len(row["features"]),
  }


def claims(rows: list[harness.Row]) -> dict[str, bool]:
  """What the paper promises, judged by perplexities over float32's."""
  found = {(r["scheme"], r["factor"], r["threshold"]): r["ratio"] for r in rows if "ratio" in r}
  apart, exact = (found.get((scheme, 1.0, PUBLISHED)) for scheme in (APART, EXACT))
  none = found.get((APART, 1.0, 0.0))
  said = {}
  if apart is not None:
    said["LLM.int8() from 6 on: within 0.3 % of float32"] = apart < CLOSE
  if exact is not None:
    said["LLM.int8() from 6 on, exact rows: within 0.3 % of float32"] = exact < CLOSE
  if apart is not None and none is not None:
    said["features from 6 on, kept apart, make it better"] = apart < none
  behind = lambda scheme: [x for (name, k, _), x in found.items() if name == scheme and k > 1]
  if behind(BASELINE):
    same = all(abs(x - 1) < 1e-3 for x in behind(BASELINE))
    said["planted outliers change nothing in float32"] = same
    worst = {scheme: max(behind(scheme)) for scheme in (INTEGERS, APART, EXACT)}
    said["they make int8 worse"] = none is not None and worst[INTEGERS] > none
    said["LLM.int8() stands them better than int8"] = worst[APART] < worst[INTEGERS]
    said["exact rows stand them better than rounded ones"] = worst[EXACT] < worst[APART]
  return said


def panels(rows: list[harness.Row]) -> list[Panel]:
  """Where outliers are, what a threshold keeps apart and costs, and what planted ones cost."""
  places = [row for row in rows if "largest" in row]
  read = [row for row in rows if "ratio" in row]
  by_layer = [Series(r["name"], list(range(len(r["largest"]))), r["largest"]) for r in places]
  chosen = [row for row in read if row["scheme"] == APART and row["factor"] == 1]
  column = lambda rows, name: [row[name] for row in rows]
  by_threshold = lambda name: [Series(APART, column(chosen, "threshold"), column(chosen, name))]
  threshold, cost = Axis("threshold; 0 keeps nothing apart"), "perplexity over float32's"
  near = Line("0.3 % above float32", y=CLOSE)
  alone = [Line(row["name"], y=row["ratio"]) for row in read if row["scheme"] == WEIGHTS]
  exact = [row for row in read if row["scheme"] == EXACT and row["factor"] == 1]
  costs = by_threshold("ratio") + [
    Series(EXACT, column(exact, "threshold"), column(exact, "ratio"), joined=False)
  ] * bool(exact)
  behind = [row for row in read if row["factor"] > 1]
  by_factor = [
    Series(scheme, column(of, "factor"), column(of, "ratio"))
    for scheme in SCHEMES
    if (of := [row for row in behind if row["scheme"] == scheme])
  ]
  published = Line("6, from which on features are outliers", y=PUBLISHED)
  return [
    Panel(
      "Inputs of linear layers", Axis("layer"), Axis("largest |x|", LOG), by_layer, [published]
    ),
    Panel("Kept apart", threshold, Axis("share of features"), by_threshold("share")),
    Panel("What a threshold costs", threshold, Axis(cost), costs, [near, *alone]),
    Panel("Planted outliers", Axis("factor", LOG), Axis(cost, LOG), by_factor, [near]),
  ]


if __name__ == "__main__":
  harness.main(run, Config())
