"""What the rows of the survey say: a line a technique, claims with verdicts, pictures."""

import itertools
import math
import statistics

from experiments import harness
from experiments.harness import Row
from experiments.lab.verdicts import Verdict, less, paired
from experiments.survey import techniques
from experiments.survey.techniques import BASELINE, NAMED

KINDS = dict.fromkeys(technique.kind for technique in techniques.TECHNIQUES)
COLOURS = dict(zip(KINDS, itertools.cycle(harness.COLOURS), strict=False))
SIZES = {
  "params M": ",.2f",
  "active M": ",.2f",
  "trainable M": ",.2f",
  "MB": ",.1f",
  "MFLOP/token": ",.2f",
  "prefill ×": ".2f",
  "decode ×": ".2f",
}
PRETRAINED = {"technique": "", "perplexity": ".2f", "change %": "+.2f", "bits/byte": ".3f", **SIZES}
TRAINED = {
  "technique": "",
  "nats/token": ".3f",
  "± seeds": ".3f",
  "bits/byte": ".3f",
  "against": "",
  "Δ nats": "+.3f",
  "± 95 %": ".3f",
  "Mtokens": ",.2f",
  **SIZES,
}


Table = tuple[str, list[Row], dict[str, str]]


def tables(measured: list[Row], *headings: str) -> list[Table]:
  """Heading, lines and columns of the pretrained and of the trained rows, where there are any."""
  both = ((pretrained(measured), PRETRAINED), (trained(measured), TRAINED))
  found = ((heading, *rest) for heading, rest in zip(headings, both, strict=True))
  return [table for table in found if table[1]]


def pretrained(measured: list[Row]) -> list[Row]:
  """A line a technique that needs no training; the change is that of the perplexity."""
  rows = [row for row in measured if "seed" not in row]
  base = next((row["nll"] for row in rows if row["technique"] == BASELINE), None)
  return [
    {
      **_sizes(row),
      "perplexity": math.exp(row["nll"]),
      "change %": 100 * math.expm1(row["nll"] - base),
      "bits/byte": row["bits_byte"],
    }
    for row in rows
  ]


def trained(measured: list[Row]) -> list[Row]:
  """A line a trained technique: means over seeds, and the difference to what it stands against."""
  return [_trained(group, measured) for group in _groups(measured).values()]


def _trained(group: list[Row], measured: list[Row]) -> Row:
  first, values = group[0], [row["nll"] for row in group]
  line = {
    **_sizes(first),
    "nats/token": statistics.mean(values),
    "± seeds": statistics.stdev(values) if len(values) > 1 else None,
    "bits/byte": statistics.mean(row["bits_byte"] for row in group),
    "Mtokens": first["tokens"] / 1e6,
  }
  if first["against"] != first["technique"]:
    found = paired(values, nll(measured, first["against"]))
    reach = found.reach if math.isfinite(found.reach) else None
    line |= {"against": first["against"], "Δ nats": found.mean, "± 95 %": reach}
  return line


def nll(measured: list[Row], technique: str) -> list[float]:
  """Nats a token of a trained technique, by seed."""
  return [row["nll"] for row in _groups(measured)[technique]]


def claims(measured: list[Row]) -> dict[str, bool | Verdict]:
  """What is expected of the rows that are there, and whether it came out."""
  found = _exact({row["technique"]: row for row in pretrained(measured)})
  there = _groups(measured)
  for name in there:
    against = NAMED[name].against or name
    if against != name:
      better, worse = (name, against) if NAMED[name].better else (against, name)
      text = f"at equal FLOPs, {better} predicts better than {worse}"
      found[text] = less(nll(measured, better), nll(measured, worse))
  return found


def _exact(by_name: dict[str, Row]) -> dict[str, bool | Verdict]:
  """What is claimed of the pretrained model, whose rows have no seeds."""
  same = [by_name[t.name] for t in techniques.TECHNIQUES if t.same_function and t.name in by_name]
  found: dict[str, bool | Verdict] = {}
  if len(same) > 1:
    text = "LoRA at its start, merged LoRA and upcycling keep the perplexity to 0.1 %"
    found[text] = all(abs(row["change %"]) < 0.1 for row in same)
  if "int8" in by_name:
    row = by_name["int8"]
    share = row["MB"] / by_name[BASELINE]["MB"]
    text = "int8 raises the perplexity by less than 2 % at less than 0.3 of the bytes"
    found[text] = row["change %"] < 2 and share < 0.3
  return found


def _groups(measured: list[Row]) -> dict[str, list[Row]]:
  """The rows of each trained technique, by seed."""
  groups: dict[str, list[Row]] = {}
  for row in measured:
    if "seed" in row:
      groups.setdefault(row["technique"], []).append(row)
  return groups


def _sizes(row: Row) -> Row:
  return {
    **{name: row[name] for name in ("technique", "kind")},
    "params M": row["parameters"] / 1e6,
    "active M": row["active"] / 1e6,
    "trainable M": row["trainable"] / 1e6,
    "MB": row["bytes"] / 1e6,
    "MFLOP/token": row["flops_token"] / 1e6,
    "prefill ×": row["prefill_ratio"],
    "decode ×": row["decode_ratio"],
  }


def draw(axes, measured: list[Row]) -> None:
  """Perplexity against bytes and decoding time (pretrained), nats against FLOPs (trained)."""
  first, second = pretrained(measured), trained(measured)
  title = "Pretrained: quality against"
  panels = [
    (first, "MB", "perplexity", "MB of parameters", f"{title} size"),
    (first, "decode ×", "perplexity", "decode time, ratio", f"{title} time"),
    (second, "MFLOP/token", "nats/token", "MFLOP a token, forward", "Trained at equal FLOPs"),
  ]
  shown = [panel for panel in panels if panel[0]]
  for ax, (rows, x, y, label, title) in zip(axes, shown, strict=True):
    ax.set(xlabel=label, ylabel=f"{y} (lower is better)")
    ax.set_title(title)
    _scatter(ax, rows, x, y)
  marks = [axes[0].plot([], [], "o", color=COLOURS[kind], label=kind)[0] for kind in COLOURS]
  axes[0].figure.legend(handles=marks, loc="outside lower center", ncols=len(marks))


def panels(measured: list[Row]) -> int:
  """How many pictures `draw` makes."""
  return 2 * bool(pretrained(measured)) + bool(trained(measured))


def _scatter(ax, rows: list[Row], x: str, y: str) -> None:
  points = [(row[x], row[y]) for row in rows]
  for row, point in zip(rows, points, strict=True):
    spread, colour = row.get("± seeds"), COLOURS[row["kind"]]
    ax.errorbar(*point, yerr=spread, fmt="o", color=colour, capsize=3, markersize=7)
  ax.margins(x=0.25, y=0.15)
  harness.label(ax, points, [row["technique"].removeprefix("trained-") for row in rows])
