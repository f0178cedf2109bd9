"""What does each loss on the load of experts even out, and what does it cost?

  scripts/run moe_losses                                      (six of the ten; about 4 minutes)
  scripts/run moe_losses --config.losses=all --config.tokens_per_parameter=20 --config.minutes=25

A small language model with eight experts of half the MLP's width for every MLP, of which a token
visits two, is trained without any loss on its routers, and with each: the load-balance loss as
three families of papers count it, the z-loss, and mutual information, beside the same router
without; importance and load, beside as noisy a router without; a bias on the choice of sigmoid
gates that is moved after each step, beside the same gates without ("loss-free").

On held-out text it is measured how even the load is, and what is paid for the text: by the model as
it was trained, which drops nothing, and by the same parameters where an expert takes at most 1.25
times its even share of a batch. An expert is dead that gets less than a hundredth of its share.
While a model trains, the load of each expert in each layer is noted.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping

import jax
import numpy as np

from effjax import data, moe
from effjax.core.typing import Array, Params
from effjax.models import Transformer
from effjax.train import next_token
from effjax.train import workdir as files
from effjax.train.step import After
from experiments import harness
from experiments.lab import budget, provenance, training
from experiments.lab.held_out import HeldOut
from experiments.lab.plots import LINEAR, Axis, Line, Panel, Series, differences
from experiments.lab.study import Run, Study
from experiments.lab.subject import Subject
from experiments.lab.verdicts import Verdict, deviation, predicts_better
from experiments.moe.mixtures import largest, sparse

EXPERTS, CHOICES = 8, 2
FACTOR = 1.25  # of the capacity
DEAD = 0.01  # of an even share
COSTS = 0.01  # of the perplexity, that a loss may cost
AS_EVEN = 1.1  # times the busiest expert's load, up to which a load counts as even as another
NONE, NOISE, SIGMOID = "none", "noise", "sigmoid"
BALANCE, FREE = "deepseek", "loss-free"
CONTROLS = {
  BALANCE: NONE,
  "switch": NONE,
  "gshard": NONE,
  "z": NONE,
  "information": NONE,
  "importance+load": NOISE,
  FREE: SIGMOID,
}
BALANCING = tuple(name for name in CONTROLS if name != "z")
HEALTH = ("max_load", "load_entropy", "dead_experts", "dropped_share")
COLUMNS = {
  "loss": "",
  "nats/token": ".4f",
  "± seeds": ".4f",
  "with capacity": ".4f",
  "max_load": ".2f",
  "load_entropy": ".3f",
  "dead_experts": ".2f",
  "dropped_share": ".3f",
}


@dataclasses.dataclass
class Config:
  """What is trained.

  Attributes:
    losses: names in `routers`, comma-separated, or "all".
    text: a source of `data.text`; its training split trains, its validation split measures.
    seeds: of each.
    tokens_per_parameter: of the dense model; 20 for a verdict.
    minutes: in which all runs are to end on two cores; it decides their size.
    coefficient: of the load-balance losses and of mutual information; z has 1e-3, importance and
      load 0.1 each, as published.
    speed: by how much the bias of loss-free balancing moves in a step.
    rows: rows of held-out text.
  """

  losses: str = "none,deepseek,noise,importance+load,sigmoid,loss-free"
  text: str = "libraries"
  seeds: int = 4
  tokens_per_parameter: float = 0.5
  minutes: float = 1.0
  coefficient: float = 0.01
  speed: float = 1e-3
  rows: int = 256


def routers(config: Config) -> dict[str, moe.TopK]:
  """The router of each row."""
  top_k = functools.partial(moe.TopK, EXPERTS, CHOICES, load_balance=0.0, z=0.0)
  balanced = functools.partial(top_k, load_balance=config.coefficient)
  noisy = functools.partial(moe.NoisyTopK, EXPERTS, CHOICES)
  return {
    NONE: top_k(),
    BALANCE: balanced(normalization="deepseek"),
    "switch": balanced(normalization="switch"),
    "gshard": balanced(normalization="gshard"),
    "z": top_k(z=1e-3),
    "information": top_k(mutual_information=config.coefficient),
    NOISE: noisy(importance=0.0, load=0.0),
    "importance+load": noisy(),
    SIGMOID: moe.SigmoidTopK(EXPERTS, CHOICES),
    FREE: moe.SigmoidTopK(EXPERTS, CHOICES),
  }


def run(config: Config, workdir: str) -> list[harness.Row]:
  """A line a loss; writes `metrics.jsonl`, `result.csv`, `plot.png` and the origin."""
  known = routers(config)
  chosen = harness.chosen(config.losses, known, what="loss")
  given, count = config.tokens_per_parameter, len(known) * config.seeds
  rung = largest(count, tokens_per_parameter=given, minutes=config.minutes)
  training.use_every_core()
  folder = files.claim(workdir, config, free=("losses",))
  corpus, seeds = data.text(config.text), range(config.seeds)
  provenance.write(folder, corpus)
  study = Study(rung, corpus, tokens_per_parameter=given, seeds=seeds, folder=folder)
  text = study.held_out(config.rows)
  tasks: dict[str, Callable[[], harness.Row]] = {}
  for name in chosen:
    after = functools.partial(moe.move_bias, speed=config.speed) if name == FREE else None
    tasks |= study.tasks(name, functools.partial(trained, study, text, name, known[name], after))
  measured = harness.compute(folder, tasks, label="runs")
  harness.plot(folder, panels)
  rows = summarize(measured)
  harness.write_csv(folder, rows)
  print(f"\n{budget.title(rung, given, config.seeds)}")
  harness.finish(folder, rows, COLUMNS, claims(measured))
  return rows


def trained(
  study: Study, text: HeldOut, name: str, router: moe.TopK, after: After | None
) -> list[harness.Row]:
  """Trains with all seeds: quality and load on held-out text, and the load along the training."""
  start = study.fresh(sparse(study.dense, router, CHOICES))
  run = Run(start, after=after, watch=r"/load$")
  subject = study.trained(name, run)
  room = moe.Capacity(FACTOR, evaluation=FACTOR)
  limited = sparse(study.dense, router.clone(capacity=room), CHOICES)
  free, kept = read(subject, text), read(Subject(limited, subject.params), text)
  history = study.history(name, run)
  return [
    {
      "loss": name,
      **text.paid(float(free["nats"][index])),
      "nll with capacity": text.paid(float(kept["nats"][index]))["nll"],
      **{column: float(free[column][index]) for column in HEALTH},
      "dropped_share": float(kept["dropped_share"][index]),
      "dead_experts": dead(free["load"][index]),
      "load": [[row["step"], *by_layer(row)[index].round(4).tolist()] for row in history],
    }
    for index in range(len(study.seeds))
  ]


def read(subject: Subject, text: HeldOut) -> dict[str, np.ndarray]:
  """What the routers of each seed say of held-out text, and the nats that it pays, [seeds, …].

  "load" is the share of all choices, [seeds, layers, experts]; others are means over batches.
  """
  batches = [jax.device_get(_metrics(subject.module, subject.params, b)) for b in text.batches]
  means = {name: np.mean([batch[name] for batch in batches], axis=0) for name in HEALTH}
  nats = np.sum([batch["nll"] * batch["weight"] for batch in batches], axis=0, dtype=np.float64)
  return means | {"nats": nats, "load": np.mean([by_layer(batch) for batch in batches], axis=0)}


@functools.partial(jax.jit, static_argnums=0)
def _metrics(module: Transformer, params: Params, batch: dict) -> dict[str, Array]:
  objective = next_token(module)
  return jax.vmap(lambda params: objective(params, batch, None)[1])(params)


def by_layer(metrics: Mapping) -> np.ndarray:
  """The load of all layers, [seeds, layers, experts]."""
  found = (np.asarray(metrics[name]) for name in sorted(metrics) if name.endswith("/load"))
  return np.concatenate([x.reshape(len(x), -1, EXPERTS) for x in found], axis=1)


def dead(load: np.ndarray) -> float:
  """How many experts of a layer get next to nothing, [layers, experts] → their mean number."""
  return float((load < DEAD / EXPERTS).sum(axis=-1).mean())


def summarize(measured: list[harness.Row]) -> list[harness.Row]:
  """A line a loss: means over seeds."""
  lines = []
  for name in dict.fromkeys(row["loss"] for row in measured):
    rows = [row for row in measured if row["loss"] == name]
    mean = lambda column, rows=rows: statistics.mean(row[column] for row in rows)
    lines.append(
      {
        "loss": name,
        "nats/token": mean("nll"),
        "± seeds": deviation([row["nll"] for row in rows]),
        "with capacity": mean("nll with capacity"),
        **{column: mean(column) for column in HEALTH},
      }
    )
  return lines


def claims(measured: list[harness.Row]) -> dict[str, Verdict]:
  """What is expected of the losses that were measured, judged over seeds."""
  return _of_load(measured) | _of_quality(measured)


def _of_load(measured: list[harness.Row]) -> dict[str, Verdict]:
  load = functools.partial(_columns, measured, "max_load")
  found = {}
  if dying := _columns(measured, "dead_experts", NONE):
    found["without any loss, experts die"] = predicts_better([0.0] * len(dying[0]), dying[0])
  for name in BALANCING:
    if both := load(name, CONTROLS[name]):
      found[f"{name} evens the load of {CONTROLS[name]}"] = predicts_better(*both)
  if both := load(FREE, BALANCE):
    ours, theirs = both
    text = f"{FREE} is as even as {BALANCE}, to {AS_EVEN - 1:.0%}"
    found[text] = predicts_better(ours, [AS_EVEN * x for x in theirs])
  return found


def _of_quality(measured: list[harness.Row]) -> dict[str, Verdict]:
  paid, found = functools.partial(_columns, measured, "nll"), {}
  for name, control in CONTROLS.items():
    if both := paid(name, control):
      ours, theirs = both
      text = f"{name} costs at most {COSTS:.0%} of the perplexity of {control}"
      found[text] = predicts_better(ours, [x + math.log(1 + COSTS) for x in theirs])
  if both := paid(FREE, BALANCE):
    found[f"{FREE} predicts better than {BALANCE}"] = predicts_better(*both)
  if both := _columns(measured, "nll with capacity", BALANCE, NONE):
    text = f"with a capacity of {FACTOR:g}, {BALANCE} predicts better than {NONE}"
    found[text] = predicts_better(*both)
  return found


def _columns(measured: list[harness.Row], column: str, *losses: str) -> list[list[float]]:
  """A column of each loss, of the seeds that all have; nothing where one was not measured."""
  found = [{row["seed"]: row[column] for row in measured if row["loss"] == x} for x in losses]
  seeds = sorted(set.intersection(*map(set, found)))
  return [[each[seed] for seed in seeds] for each in found] if seeds else []


def panels(measured: list[harness.Row]) -> list[Panel]:
  """The busiest expert's load by layer and step, balance against quality; what verdicts judge."""
  lines = summarize(measured)
  busiest = Axis("busiest expert's load, over an even one")
  quality = Axis("held-out text, nats a token (lower is better)")
  even = Line("an even load", y=1.0)
  along = {line["loss"]: _along(measured, line["loss"]) for line in lines}
  layers = max((len(x) for x in along.values()), default=0)
  points = [
    Series(line["loss"], [line["max_load"]], [line["nats/token"]], [line["± seeds"]],
           joined=False, names=[line["loss"]]) for line in lines
  ]  # fmt: skip
  return [
    *(
      Panel(
        f"Layer {layer + 1} while it trains",
        Axis("step", LINEAR),
        busiest,
        [Series(name, *load[layer]) for name, load in along.items() if layer < len(load)],
        [even],
      )
      for layer in range(layers)
    ),
    Panel(
      "Balance and quality",
      busiest,
      quality,
      points,
      [dataclasses.replace(even, x=1.0, y=None)],
      "standard deviation over seeds",
    ),
    *differences("Verdicts on the load", "busiest load, or dead experts", _of_load(measured)),
    *differences("Verdicts on quality", "difference, nats a token", _of_quality(measured)),
  ]


def _along(measured: list[harness.Row], name: str) -> list[tuple[list[int], list[float]]]:
  """For each layer steps, and the mean over seeds of the busiest expert's load there."""
  seeds = [row["load"] for row in measured if row["loss"] == name]
  steps = [step for step, *_ in seeds[0]]
  loads = np.array([[layers for _, *layers in rows] for rows in seeds])
  busiest = EXPERTS * loads.max(axis=-1).mean(axis=0)
  return [(steps, busiest[:, layer].tolist()) for layer in range(busiest.shape[1])]


if __name__ == "__main__":
  harness.main(run, Config())
