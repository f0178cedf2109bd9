"""The survey in pictures: quality against what it costs, and what its verdicts are about."""

from experiments.harness import Row
from experiments.lab.plots import LINEAR, Axis, Line, Panel, Series, differences
from experiments.survey.table import DEAR, LIGHT, SAME, claims, pretrained, trained
from experiments.survey.techniques import BASELINE


def panels(measured: list[Row]) -> list[Panel]:
  """Perplexity against size and time, and its change; nats against FLOPs, and their differences."""
  first, second = pretrained(measured), trained(measured)
  judged = {_short(claim): found for claim, found in claims(measured).items()}
  return [
    *(_pretrained(first) if first else ()),
    *([_trained(second)] if second else ()),
    *differences("Trained: what the verdicts are about", "nats a token, first − second", judged),
  ]


def _pretrained(rows: list[Row]) -> list[Panel]:
  base = next(row for row in rows if row["technique"] == BASELINE)
  rows = [{**row, "place": float(i)} for i, row in enumerate(rows)]
  dear = Line(f"{DEAR:g} % above {BASELINE}", y=(1 + DEAR / 100) * base["perplexity"])
  light = Line(f"{LIGHT:g} of the bytes of {BASELINE}", x=LIGHT * base["MB"])
  bounds = [Line(f"± {SAME:g} %", y=bound) for bound in (-SAME, SAME)]
  quality = Axis("perplexity (lower is better)")
  every = Axis("technique", LINEAR, {row["place"]: row["technique"] for row in rows})
  return [
    Panel(
      "Pretrained: quality against size",
      Axis("parameters (MB)"),
      quality,
      _kinds(rows, "MB", "perplexity", named=True),
      [dear, light],
    ),
    Panel(
      "Pretrained: quality against time",
      Axis(f"time of decoding, over that of {BASELINE}"),
      quality,
      _kinds(rows, "decode ×", "perplexity", named=True),
      [dear],
    ),
    Panel(
      "Pretrained: what changes",
      every,
      Axis("change of the perplexity (%)"),
      _kinds(rows, "place", "change %"),
      [*bounds, Line(f"{DEAR:g} %", y=DEAR)],
    ),
  ]


def _trained(rows: list[Row]) -> Panel:
  return Panel(
    "Trained at equal FLOPs",
    Axis("forward pass (MFLOP a token)"),
    Axis("held-out text, nats a token (lower is better)"),
    _kinds(rows, "MFLOP/token", "nats/token", named=True),
    bars="standard deviation over seeds",
  )


def _kinds(rows: list[Row], x: str, y: str, *, named: bool = False) -> list[Series]:
  """The points of each kind of technique."""
  found: dict[str, list[Row]] = {}
  for row in rows:
    found.setdefault(row["kind"], []).append(row)
  column = lambda kind, name: [row.get(name) for row in found[kind]]
  return [
    Series(
      kind,
      column(kind, x),
      column(kind, y),
      column(kind, "± seeds"),
      joined=False,
      names=[_short(row["technique"]) for row in found[kind]] if named else (),
    )
    for kind in found
  ]


def _short(text: str) -> str:
  return text.removeprefix("at equal FLOPs, ").replace("trained-", "")
