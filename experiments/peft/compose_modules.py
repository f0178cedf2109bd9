"""Do modules that were trained apart work together?

  scripts/run compose_modules                                                     (5 minutes)

For each of some domains of text a LoRA is trained beside the same frozen decoder (SmolLM2-135M), by
itself, from random numbers of its own; and a prefix, all of them from the same ones. Then they are
put together without more training, and every domain's held-out text is read. LoRAs are combined by
`peft.combine`: "sum" and "mean" are exact (cat), "svd" is the sum at the rank of one, "linear",
"ties" and "dare" mix factors (the first and the last with weights of a mean; TIES makes one by
itself); "minus x" is the base with a domain's change negated, and "without x" the sum of the
others. Prefixes are composed as P₀ + Σ (P_x − P₀), all or a mean. A sum keeps what each brings, so
a composition holds where its mean over domains is below that of no module; what it costs is told by
the mean of each domain under its own. Differences are paired by seed.

Measured (`results/compose_modules`, 6 steps of 96 tokens a module, 192 held-out tokens a domain, 3
seeds), as means of a French book and manual pages: no module 3.770 nats a token; under its own LoRA
3.525, the other's 3.661; the sum of both 3.542, mean 3.556, svd 3.544, TIES 3.555, linear 3.567,
DARE 3.567; its own negated 4.351. So LoRAs that were trained apart work together: sum and mean are
better than no module, and neither is told from each domain's own; of the rules none is better than
the mean by more than its interval, and DARE is worse. A prefix that begins at random numbers has in
so few steps not yet made up for what these spoil (4.598 under a domain's own), and its compositions
say nothing: their sum is 4.219. Removing is exact to the bit, and rows that choose a module each
give the very logits of runs apart.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax import peft
from effjax.core import trees
from effjax.core.typing import Array, Params, PyTree
from effjax.layers.forward import forward
from effjax.models import Transformer
from effjax.peft import named, prefix
from effjax.train import workdir as files
from experiments import harness
from experiments.lab import provenance
from experiments.lab.plots import LINEAR, Axis, Panel, Series, differences
from experiments.lab.subject import Subject
from experiments.lab.verdicts import Verdict, deviation, predicts_better
from experiments.peft.methods import METHODS
from experiments.peft.tasks import Continuing
from experiments.peft.trials import Trials

LORA, PREFIX = "lora", "prefix"
NONE, SUM, MEAN, OTHERS = "none", "sum", "mean", "others"
DENSITY = 0.5  # of what TIES and DARE keep
APART = 100  # between the seeds of domains, above any other
CLOSE = 1e-3  # logits that are equal but for rounding
COMBINED: Mapping[str, tuple[str, bool, dict[str, Any]]] = {
  # name → method of `peft.combine`, whether weights are those of a mean, options
  SUM: ("cat", False, {}),
  MEAN: ("cat", True, {}),
  "svd": ("svd", False, {}),
  "linear": ("linear", True, {}),
  "ties": ("ties", False, {"density": DENSITY}),
  "dare": ("dare_linear", True, {"density": DENSITY}),
}


@dataclasses.dataclass
class Config:
  """What is trained, and on what.

  Attributes:
    model: a name or path for `models.load`, or a preset such as "tiny", which starts at random.
    domains: sources of `data.text`, comma-separated.
    rows, length, batch: rows that are held out of each; tokens of a row; rows of a step.
    steps: of each module.
    rate: what the rates of `peft.methods` are multiplied by.
    seeds: how many.
  """

  model: str = "smollm2-135m"
  domains: str = "debian-handbook/fr-FR,manpages"
  rows: int = 4
  length: int = 48
  batch: int = 2
  steps: int = 6
  rate: float = 2.0
  seeds: int = 2


def run(config: Config, workdir: str) -> list[harness.Row]:
  """A line a kind and combination; writes `metrics.jsonl`, `result.csv`, `plot.png`, modules."""
  domains = [name.strip() for name in config.domains.split(",")]
  if len(set(domains)) < max(2, len(domains)):
    raise ValueError(f"domains={config.domains!r}; allowed: two or more, each once")
  for name in ("steps", "seeds"):
    if (given := getattr(config, name)) < 1:
      raise ValueError(f"{name}={given}; allowed: from 1")
  folder = files.claim(workdir, config, free=("seeds",))
  study = Study(config, domains, folder)
  for domain, task in study.tasks.items():
    provenance.write(study.folder_of(domain), task.corpus)
  harness.compute(folder, study.rows(), label="combinations")
  harness.plot(folder, panels)
  measured = files.read_rows(folder / files.METRICS)
  rows = summary(measured)
  columns = {"kind": "", "combination": ""} | dict.fromkeys([*domains, "mean", "± seeds"], ".4f")
  harness.finish(folder, rows, columns, claims(measured))
  harness.write_csv(folder, rows)
  return rows


class Study:
  """Modules, trained when first asked for and kept in the folder, and what they are made into."""

  def __init__(self, config: Config, domains: Sequence[str], folder: Path):
    sizes: Any = {"rows": config.rows, "length": config.length, "batch": config.batch}
    self.tasks = {name: Continuing(config.model, name, **sizes) for name in domains}
    self._config, self._domains, self._folder = config, list(domains), folder
    self._trials = Trials(self.tasks[domains[0]], config.steps)
    self._module = functools.cache(self._trained)

  @property
  def base(self) -> Subject:
    """The model as it is."""
    return self._trials.task.subject

  def folder_of(self, domain: str) -> Path:
    """Where a domain's origin and modules are kept."""
    path = self._folder / "domains" / domain.replace("/", "_").replace(":", "_")
    files.make(path)
    return path

  def rows(self) -> dict[str, Callable[[], harness.Row]]:
    """Name → what measures it."""
    found: dict[str, Callable[[], harness.Row]] = {NONE: self._none, "exact": self.exact}
    for seed in range(self._config.seeds):
      for kind, made in ((LORA, self.of_loras(seed)), (PREFIX, self.of_prefixes(seed))):
        for combination, make in made.items():
          row = functools.partial(self._row, kind, combination, seed, make)
          found[f"{kind}: {combination}, seed={seed}"] = row
    return found

  def of_loras(self, seed: int) -> dict[str, Callable[[], Subject]]:
    """Combination → the model with it."""
    count = len(self._domains)
    alone = lambda name: lambda: self._module(LORA, name, seed)
    made: dict[str, Callable[[], Subject]] = {name: alone(name) for name in self._domains}
    for combination, (method, mean, options) in COMBINED.items():
      if combination == "dare":
        options = options | {"key": jax.random.key(seed)}
      weights = [1 / count if mean else 1.0] * count
      every = functools.partial(self._combined, seed, self._domains, weights, method, **options)
      made[combination] = every
    for name in self._domains:
      made[f"minus {name}"] = functools.partial(self._combined, seed, [name], [-1.0], "cat")
      rest = [other for other in self._domains if other != name]
      if len(rest) > 1:
        ones = [1.0] * len(rest)
        made[f"without {name}"] = functools.partial(self._combined, seed, rest, ones, "cat")
    return made

  def of_prefixes(self, seed: int) -> dict[str, Callable[[], Subject]]:
    """Combination → the model with it."""
    alone = lambda name: lambda: self._module(PREFIX, name, seed)
    made: dict[str, Callable[[], Subject]] = {name: alone(name) for name in self._domains}
    for combination, share in ((SUM, 1.0), (MEAN, 1 / len(self._domains))):
      made[combination] = functools.partial(self._composed, seed, share)
    return made

  def exact(self) -> harness.Row:
    """What adding, removing and choosing by row change that they should not."""
    loras = {f"{i}": self._module(LORA, d, 0).params for i, d in enumerate(self._domains)}
    base, first = self.base.params, next(iter(loras))
    joined = named.join(loras, base)
    without = functools.reduce(named.remove, loras, joined)
    prefixed = self._module(PREFIX, self._domains[0], 0)
    plain = prefix.remove(prefixed.config, prefixed.params)[1]
    batches = [task.held_out.batches[0]["tokens"][:1] for task in self.tasks.values()]
    logits = functools.partial(_logits, self.base.module)
    together = logits(named.use(joined, [*loras]), np.concatenate(batches))
    apart = [logits(loras[name], x)[0] for name, x in zip(loras, batches, strict=True)]
    summed = logits(named.use(joined, dict.fromkeys(loras, 1.0)), batches[0])
    made = self._combined(0, self._domains, [1.0] * len(loras), "cat")
    cat = logits(made.params, batches[0])
    return {
      "kind": "exact",
      "removed loras": _same(without, base) and _same(peft.detach(loras[first])[0], base),
      "removed prefix": _same(plain, base),
      "rows": float(jnp.abs(together - jnp.stack(apart)).max()),
      "cat": float(jnp.abs(summed - cat).max()),
    }

  def _none(self) -> harness.Row:
    return self._row("", NONE, None, lambda: self.base)

  def _row(
    self, kind: str, combination: str, seed: int | None, make: Callable[[], Subject]
  ) -> harness.Row:
    """Nats a token of every domain's text."""
    subject, plain = make(), METHODS["full"]  # reads batches as they are
    scores = {name: task.score(plain, subject) for name, task in self.tasks.items()}
    nats = {name: score[Continuing.metric] for name, score in scores.items()}
    return {"kind": kind, "combination": combination, "seed": seed, "nats": nats}

  def _trained(self, kind: str, domain: str, seed: int) -> Subject:
    """A module by itself, on the model."""
    method = METHODS[kind]
    own = seed if kind == PREFIX else seed + APART * self._domains.index(domain)
    path = self.folder_of(domain) / f"{kind} {seed}"
    if not (path / peft.files.FILE).exists():
      rate = self._config.rate * method.rate
      subject, *_ = self._trials.trained(method, rate, own, self.tasks[domain])
      peft.save(subject.params, path)
    config = method(self.base, jax.random.key(own)).config
    return Subject(config, peft.load(self.base.params, path))

  def _combined(
    self, seed: int, domains: Sequence[str], weights: Sequence[float], method: str, **options: Any
  ) -> Subject:
    loras = [peft.detach(self._module(LORA, name, seed).params)[1] for name in domains]
    made = peft.combine(loras, weights, method=method, **options)
    return Subject(self.base.config, peft.attach(self.base.params, made))

  def _composed(self, seed: int, share: float) -> Subject:
    """P₀ + share · Σ (P_x − P₀), where P₀ is what all prefixes of a seed began at."""
    start = METHODS[PREFIX](self.base, jax.random.key(seed))
    prefix_of = lambda subject: peft.detach(subject.params)[1]
    general = prefix_of(start)
    change = lambda name: jax.tree.map(
      jnp.subtract, prefix_of(self._module(PREFIX, name, seed)), general
    )
    moved = {name: change(name) for name in self._domains}
    made = peft.compose(general, moved, dict.fromkeys(moved, share))
    return Subject(start.config, peft.attach(self.base.params, made))


@functools.partial(jax.jit, static_argnums=0)
def _logits(module: Transformer, params: Params, tokens: Array) -> Array:
  return forward(module, params, {"tokens": tokens})[0]


def _same(a: PyTree, b: PyTree) -> bool:
  """Whether two trees hold the same numbers, to the bit."""
  ours, theirs = trees.items(a), trees.items(b)
  equal = lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes()
  return ours.keys() == theirs.keys() and all(equal(ours[path], theirs[path]) for path in ours)


class Found:
  """Rows, by kind and combination."""

  def __init__(self, rows: Sequence[harness.Row]):
    self._rows = [row for row in rows if "nats" in row]
    self.exact = next((row for row in rows if row["kind"] == "exact"), None)
    self.domains = list(self._rows[0]["nats"]) if self._rows else []

  def of(self, kind: str) -> dict[str, dict[int | None, dict[str, float]]]:
    """Combination → seed → domain → nats."""
    found: dict[str, dict[int | None, dict[str, float]]] = {}
    for row in self._rows:
      if row["kind"] == kind:
        found.setdefault(row["combination"], {})[row["seed"]] = row["nats"]
    return found

  def none(self) -> dict[str, float]:
    """Domain → nats, of the model as it is."""
    return self.of("")[NONE][None]

  def means(self, kind: str, combination: str, only: Sequence[str] = ()) -> dict[int, float]:
    """Seed → the mean over domains, all or some.

    `combination` is a name, or "own", each domain under its own module; "others", under those of
    the others; "minus", each under its own negated; "without", each under the sum of the others.
    """
    found = self.of(kind)
    seeds = set.intersection(*({*found.get(name, {})} for name in self.domains))
    every: dict[int, float] = {}
    for seed in sorted(seed for seed in seeds if seed is not None):
      paid = [self._paid(found, combination, d, seed) for d in only or self.domains]
      known = [nats for nats in paid if nats is not None]
      if len(known) == len(paid):
        every[seed] = statistics.mean(known)
    return every

  def _paid(self, found: dict, combination: str, domain: str, seed: int) -> float | None:
    """Nats of a domain under a combination; None where that was not measured."""
    if combination == NONE:
      return self.none()[domain]
    if combination == OTHERS:
      others = [found[name][seed][domain] for name in self.domains if name != domain]
      return statistics.mean(others)
    name = {"own": domain, "minus": f"minus {domain}", "without": f"without {domain}"}
    return found.get(name.get(combination, combination), {}).get(seed, {}).get(domain)


def claims(measured: Sequence[harness.Row]) -> dict[str, bool | Verdict]:
  """That modules are of their domain, keep their worth together, and leave nothing behind."""
  found, said = Found(measured), dict[str, bool | Verdict]()
  if found.exact is not None:
    said["removing LoRAs leaves the model bit-identical"] = found.exact["removed loras"]
    said["removing a prefix leaves the model bit-identical"] = found.exact["removed prefix"]
    said[f"modules chosen by row: logits of runs apart within {CLOSE:g}"] = (
      found.exact["rows"] < CLOSE
    )
    said[f"cat: logits of the sum of modules within {CLOSE:g}"] = found.exact["cat"] < CLOSE
  wanted = [("own", NONE), ("own", OTHERS), (SUM, NONE), (MEAN, NONE), ("own", SUM)]
  wanted += [(SUM, "without"), (NONE, "minus")]
  wanted += [(name, MEAN) for name in COMBINED if name != MEAN]
  for kind in (LORA, PREFIX):
    for better, worse in wanted:
      ours, theirs = found.means(kind, better), found.means(kind, worse)
      seeds = sorted(ours.keys() & theirs.keys())
      if seeds:
        verdict = predicts_better([ours[s] for s in seeds], [theirs[s] for s in seeds])
        said[f"{kind}: {_words(better)} is better than {_words(worse)}"] = verdict
  return said


def _words(combination: str) -> str:
  words = {"own": "a domain's own", NONE: "no module", OTHERS: "another domain's"}
  words |= {"without": "the sum of the others", "minus": "a domain's own, negated,"}
  return words.get(combination, combination)


def summary(measured: Sequence[harness.Row]) -> list[harness.Row]:
  """A line a kind and combination: means over seeds, of each domain and of all."""
  found = Found(measured)
  lines: list[harness.Row] = []
  for kind in ("", LORA, PREFIX):
    for combination, seeds in found.of(kind).items():
      means = [statistics.mean(nats.values()) for nats in seeds.values()]
      line = {name: statistics.mean(n[name] for n in seeds.values()) for name in found.domains}
      spread = {"mean": statistics.mean(means), "± seeds": deviation(means)}
      lines.append({"kind": kind or "–", "combination": combination} | line | spread)
  return lines


def panels(measured: Sequence[harness.Row]) -> list[Panel]:
  """What each combination pays beyond no module in each domain; the verdicts."""
  found, shown = Found(measured), []
  for kind in (LORA, PREFIX):
    lines = [line for line in summary(measured) if line["kind"] == kind]
    places = {-float(number): line["combination"] for number, line in enumerate(lines)}
    series = [
      Series(d, [line[d] - found.none()[d] for line in lines], list(places), joined=False)
      for d in found.domains
    ]
    title, words = f"{kind}: together", "nats a token beyond those of no module"
    shown.append(Panel(title, Axis(words), Axis("combination", LINEAR, places), series))
  judged = {text: v for text, v in claims(measured).items() if isinstance(v, Verdict)}
  return shown + differences("Verdicts", "nats, what is called better less the other", judged)


if __name__ == "__main__":
  harness.main(run, Config())
