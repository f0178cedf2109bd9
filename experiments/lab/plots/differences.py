"""The panel of verdicts over seeds: each difference, its interval, and its bound."""

import math
from collections.abc import Mapping

from experiments.lab.plots.panels import LINEAR, Axis, Line, Panel, Series
from experiments.lab.verdicts import CONFIDENCE, HELD, NOT_HELD, UNDECIDED, Verdict


def differences(title: str, words: str, claims: Mapping[str, object]) -> list[Panel]:
  """A panel of the claims that have a verdict over seeds, from top to bottom; none without them.

  Args:
    title: of the panel.
    words: what the differences are, and their unit.
    claims: the verdict of each claim; those that are true or false have no difference.
  """
  judged = {text: found for text, found in claims.items() if isinstance(found, Verdict)}
  if not judged:
    return []
  rows = {text: -float(row) for row, text in enumerate(judged)}
  series = []
  for word in (HELD, NOT_HELD, UNDECIDED):
    found = {text: v.difference for text, v in judged.items() if v.word == word}
    known = {text: interval for text, interval in found.items() if interval is not None}
    reach = [x.reach if math.isfinite(x.reach) else None for x in known.values()]
    means = [interval.mean for interval in known.values()]
    y = [rows[text] for text in known]
    if known:
      series.append(Series(word, means, y, reach, along="x", joined=False))
  bounds = {bound for verdict in judged.values() for bound in verdict.bounds}
  lines = [
    Line("bound of the verdict", x=bound) for bound in sorted(bounds) if math.isfinite(bound)
  ]
  ticks = {row: text for text, row in rows.items()}
  bars = f"{CONFIDENCE:.0%} interval of the mean over seeds"
  return [Panel(title, Axis(words), Axis("claim", LINEAR, ticks), series, lines, bars)]
