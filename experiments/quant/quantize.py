"""What does a model pay for few bits, and what does a text at hand give back?

  scripts/run quantize
  scripts/run quantize --config.model=gemma3-270m --workdir=runs/quantize_gemma

The linear layers of a pretrained model are quantised by every scheme of `quant.schemes`, and its
token table, which is the head too, to 8 bits in all of them but float32. Each reads the same
held-out text and decodes in turn with float32. Schemes that are calibrated see a few rows of the
training text. The relative error is ‖W − Ŵ‖ / ‖W‖ over the linear layers; bits count codes and
constants of these.
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp

from effjax import data
from effjax.core import trees, weights
from effjax.data import loader
from effjax.quant import methods
from effjax.train import perplexity
from effjax.train import workdir as files
from experiments import harness
from experiments.lab import provenance
from experiments.lab.held_out import HeldOut, held_out
from experiments.lab.plots import LOG, Axis, Line, Panel, Series
from experiments.lab.speed import Runner, compare
from experiments.lab.subject import Subject, load
from experiments.quant.schemes import BASELINE, LINEAR, SCHEMES, Scheme, Seen

INT8, LLM_INT8, NF4 = 1.005, 1.003, 1.01  # most that the perplexity may grow
COLUMNS = {
  "name": "",
  "bits": ".2f",
  "MB": ",.1f",
  "error": ".2%",
  "perplexity": ",.3f",
  "ratio": ".4f",
  "decode": ".2f",
}


@dataclasses.dataclass
class Config:
  """What is quantised, and what is read.

  Attributes:
    model: a name or path for `models.load`, or a preset such as "tiny", which starts at random.
    text: a source of `data.text`: the training split calibrates, the validation split measures.
    rows, length: rows that are read, and tokens of each.
    calibration: rows that the calibrated schemes see.
    table: how the token table is quantised, a method of `quantize`; empty leaves it as it is.
    decode: tokens decoded to measure speed.
    schemes: which, comma-separated, or all.
  """

  model: str = "smollm2-135m"
  text: str = "libraries"
  rows: int = 8
  length: int = 512
  calibration: int = 16
  table: str = "int8"
  decode: int = 16
  schemes: str = "all"


def run(config: Config, workdir: str) -> list[harness.Row]:
  """A row a scheme; writes `metrics.jsonl`, `result.csv`, `plot.png` and origins to `workdir`."""
  chosen = harness.chosen(config.schemes, SCHEMES, what="scheme")
  if config.table and config.table not in methods():
    raise ValueError(f"table={config.table!r}; allowed: {', '.join(methods())}, or empty")
  folder = files.claim(workdir, config, free=("schemes",))
  corpus = data.text(config.text)
  provenance.write(folder, corpus)
  study = Study(config, corpus)
  names = list(dict.fromkeys([BASELINE, *chosen]))
  tasks = {name: functools.partial(study.row, SCHEMES[name]) for name in names}
  rows = compared(harness.compute(folder, tasks, label="schemes"))
  harness.plot(folder, lambda measured: panels(compared(measured)))
  harness.finish(folder, rows, COLUMNS, claims(rows))
  harness.write_csv(folder, rows)
  return rows


class Study:
  """A model and its texts, loaded when a row wants them."""

  def __init__(self, config: Config, corpus: data.Corpus):
    self._config, self._corpus = config, corpus

  def row(self, scheme: Scheme) -> harness.Row:
    """Bits, error, nats and times of a scheme."""
    subject = scheme(self._subject, self._seen, self._config.table or None)
    runner = self._baseline if scheme.name == BASELINE else self._runner(subject)
    found = compare(runner, self._baseline, self._text.batches)
    return {"kind": scheme.kind, **sizes(subject, self._subject), **found}

  def _runner(self, subject: Subject) -> Runner:
    return Runner(subject, self._text.batches[0], decode=self._config.decode)

  @functools.cached_property
  def _baseline(self) -> Runner:
    return self._runner(self._subject)

  @functools.cached_property
  def _loaded(self):
    return load(self._config.model)

  @property
  def _subject(self) -> Subject:
    return self._loaded[0]

  @functools.cached_property
  def _text(self) -> HeldOut:
    options = {"rows": self._config.rows, "length": self._config.length, "batch_size": 1}
    return held_out(self._corpus, self._loaded[1], **options)

  @functools.cached_property
  def _seen(self) -> Seen:
    sizes: Any = {"batch_size": 1, "length": self._config.length}
    batches = loader(self._corpus, self._loaded[1], seed=0, split="train", **sizes)
    return Seen(self._subject, [next(batches) for _ in range(self._config.calibration)])


def sizes(subject: Subject, original: Subject) -> harness.Row:
  """Bytes of all parameters, bits a weight of the linear layers and their relative error."""
  linear, exact = (trees.select(s.params, LINEAR) for s in (subject, original))
  off = sum(
    float(jnp.square(weights.materialize(linear[path]) - w).sum()) for path, w in exact.items()
  )
  whole = sum(float(jnp.square(w).sum()) for w in exact.values())
  return {
    "bytes": trees.nbytes(subject.params),
    "bits": 8 * trees.nbytes(linear) / sum(w.size for w in exact.values()),
    "error": math.sqrt(off / whole),
  }


def compared(rows: list[harness.Row]) -> list[harness.Row]:
  """Perplexities, and each over that of float32."""
  exact = next((row["nll"] for row in rows if row["name"] == BASELINE), math.nan)
  return [
    {
      **row,
      "MB": row["bytes"] / 1e6,
      "perplexity": perplexity(row["nll"]),
      "ratio": perplexity(row["nll"] - exact),
      "decode": 1 / row["decode_ratio"],
    }
    for row in rows
  ]


def claims(rows: list[harness.Row]) -> dict[str, bool]:
  """What the papers promise, judged by perplexities over float32's."""
  ratio, bits = ({row["name"]: row.get(key) for row in rows} for key in ("ratio", "bits"))
  promised = {
    "int8: within 0.5 % of float32": lambda: ratio["int8"] < INT8,
    "LLM.int8(): within 0.3 % of float32": lambda: ratio["llm-int8"] < LLM_INT8,
    "SmoothQuant is better than int8 with activations rounded as they are": (
      lambda: ratio["smoothquant"] < ratio["int8-dynamic"]
    ),
    "NF4 is better than FP4 and int4": lambda: ratio["nf4"] < min(ratio["fp4"], ratio["int4"]),
    "double quantisation changes NF4 by less than 1 %": (
      lambda: abs(ratio["nf4-double"] / ratio["nf4"] - 1) < NF4 - 1
    ),
    "GPTQ is better than the nearest at 4 bits": lambda: ratio["int4-gptq"] < ratio["int4"],
    "AWQ is better than the nearest at 4 bits": lambda: ratio["int4-awq"] < ratio["int4"],
    "QMoE is better than the nearest of three numbers, in less than a bit a weight": (
      lambda: ratio["ternary-qmoe"] < ratio["ternary"] and bits["ternary-qmoe"] < 1
    ),
  }
  found = {}
  for text, holds in promised.items():
    try:
      found[text] = bool(holds())
    except KeyError:  # of a scheme that was not chosen
      continue
  return found


def panels(rows: list[harness.Row]) -> list[Panel]:
  """What the bits cost in perplexity, and what they give in speed."""
  kinds = list(dict.fromkeys(row["kind"] for row in rows))

  def series(x: str, y: str) -> list[Series]:
    of = lambda kind: [row for row in rows if row["kind"] == kind]
    column = lambda kind, name: [row[name] for row in of(kind)]
    return [
      Series(kind, column(kind, x), column(kind, y), joined=False, names=column(kind, "name"))
      for kind in kinds
    ]

  bits, cost = Axis("bits a weight of the linear layers", LOG), Axis("perplexity over float32's")
  speed = Axis("tokens a second in decoding, over float32's")
  lines = [Line("int8 is to stay below: 0.5 % above float32", y=INT8)]
  return [
    Panel("Quality against size", bits, cost, series("bits", "ratio"), lines),
    Panel("Speed against size", bits, speed, series("bits", "decode"), [Line("float32", y=1.0)]),
  ]


if __name__ == "__main__":
  harness.main(run, Config())
