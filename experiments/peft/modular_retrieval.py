"""Do modules for a domain and a task add up to one for a combination that was never trained?

  scripts/run modular_retrieval                                              (5 minutes)
  scripts/run modular_retrieval --config.seeds=0,1,2,3 --config.entries=600
      --config.queries=120 --config.steps=100 --workdir=runs/full            (under an hour)

Modular Retrieval (arXiv 2303.13419) puts a prefix before queries, P_general + P_domain + P_task,
and trains it in two stages: the general one on all that there is, then the modules. It claims that
a combination of modules generalises to queries that they were not trained on together, and that
what a module does can be told from taking it away. Here the encoder is all-MiniLM-L6-v2, frozen,
and documents take no prefix; `documents=general` and `second=all` are the published code's way.

Entries of WordNet, FOLDOC, the Linux manual pages and the Python documentation have a name, a
definition and a detail. Four tasks ask with one of them for another: "define" (name → definition),
"expand" (name → detail), "name" (definition → name) and "continue" (definition → detail). All parts
of all held-out entries are one pool, so that nothing but its module tells a query which part is
wanted. Each seed leaves one task out of each domain; four seeds leave every combination out once.

From the first stage all rows go on for as many steps: the general prefix, so that it has seen as
much; the modules; and a prefix on one combination alone, which is what modules might reach. Last,
weights of all modules are learned on a combination, a quarter as long.

Measured by default, 16 steps a stage and 2 seeds, which decide nearly nothing: mean reciprocal rank
on held-out combinations 0.477 as it is, 0.460 with the general prefix, 0.474 with modules, 0.490
with one trained on it; on seen ones 0.420, 0.398, 0.427 and 0.499. Another task's module takes
0.053 away and none 0.015; without the domain's module it is better by 0.011.
"""

from pathlib import Path

from effjax.train import workdir as files
from experiments import harness
from experiments.lab import provenance
from experiments.peft.retrieval.findings import Findings, claims, panels, summary
from experiments.peft.retrieval.setup import Config
from experiments.peft.retrieval.study import Study

COLUMNS = {
  "kind": "",
  "held out mrr": ".3f",
  "held out ±": ".3f",
  "held out recall@1": ".3f",
  "held out recall@10": ".3f",
  "held out prefers": ".3f",
  "seen mrr": ".3f",
  "seen ±": ".3f",
  "seen recall@1": ".3f",
  "seen recall@10": ".3f",
  "seen prefers": ".3f",
}


def run(config: Config, workdir: str) -> list[harness.Row]:
  """A row a kind of prefix; writes `metrics.jsonl`, `result.csv`, `plot.png` to `workdir`."""
  study = Study(config, Path(workdir))
  corpus = study.shared.grid.corpus
  folder = files.claim(workdir, config, free=("seeds",))
  provenance.write(folder, corpus)
  measured = harness.compute(folder, study.rows(), label="rows")
  held_out = {seed: study.held_out(seed) for seed in study.seeds}
  harness.plot(folder, lambda rows: panels(rows, held_out))
  found = Findings(measured, held_out)
  rows = summary(found)
  harness.finish(folder, rows, COLUMNS, claims(found))
  harness.write_csv(folder, rows)
  return rows


if __name__ == "__main__":
  harness.main(run, Config())
