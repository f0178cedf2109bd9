"""What the rows of the survey say: a line a technique, and claims with verdicts."""

import math
import statistics

from effjax.train import perplexity
from experiments.harness import Row
from experiments.lab.verdicts import Verdict, deviation, paired, predicts_better
from experiments.survey import techniques
from experiments.survey.techniques import BASELINE, NAMED

SAME, DEAR, LIGHT = 0.1, 2.0, 0.3  # % of the perplexity, of it, and part of the bytes
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
      "perplexity": perplexity(row["nll"]),
      "change %": 100 * _growth(row["nll"] - base),
      "bits/byte": row["bits_byte"],
    }
    for row in rows
  ]


def _growth(nats: float) -> float:
  """e^nats − 1, exact near 0; infinity where it overflows."""
  return math.expm1(nats) if nats < 700 else math.inf


def trained(measured: list[Row]) -> list[Row]:
  """A line a trained technique: means over seeds, and the difference to what it stands against."""
  return [_trained(group, measured) for group in _groups(measured).values()]


def _trained(group: list[Row], measured: list[Row]) -> Row:
  first, values = group[0], [row["nll"] for row in group]
  line = {
    **_sizes(first),
    "nats/token": statistics.mean(values),
    "± seeds": deviation(values),
    "bits/byte": statistics.mean(row["bits_byte"] for row in group),
    "Mtokens": first["tokens"] / 1e6,
  }
  if first["against"] != first["technique"]:
    line |= {"against": first["against"], **_apart(values, nll(measured, first["against"]))}
  return line


def _apart(values: list[float], others: list[float]) -> Row:
  """The mean difference and its interval; NaN where a run diverged."""
  if not all(map(math.isfinite, (*values, *others))):
    return {"Δ nats": math.nan, "± 95 %": None}
  found = paired(values, others)
  return {"Δ nats": found.mean, "± 95 %": found.reach if math.isfinite(found.reach) else None}


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
      found[text] = predicts_better(nll(measured, better), nll(measured, worse))
  return found


def _exact(by_name: dict[str, Row]) -> dict[str, bool | Verdict]:
  """What is claimed of the pretrained model, whose rows have no seeds."""
  same = [by_name[t.name] for t in techniques.TECHNIQUES if t.same_function and t.name in by_name]
  found: dict[str, bool | Verdict] = {}
  if len(same) > 1:
    text = f"LoRA at its start, merged LoRA and upcycling keep the perplexity to {SAME:g} %"
    found[text] = all(abs(row["change %"]) < SAME for row in same)
  if "int8" in by_name:
    row = by_name["int8"]
    share = row["MB"] / by_name[BASELINE]["MB"]
    text = f"int8 raises the perplexity by less than {DEAR:g} % at less than {LIGHT:g} of the bytes"
    found[text] = row["change %"] < DEAR and share < LIGHT
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
