"""Do modules for a domain and a task add up to one for a combination that was never trained?

  scripts/run modular_retrieval                                              (5 minutes)
  scripts/run modular_retrieval --config.seeds=0,1,2,3 --config.entries=600
      --config.queries=120 --config.steps=100 --workdir=runs/full            (half an hour)

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

Measured by the second command (28 minutes; `results/modular_retrieval`), mean reciprocal rank of
the right document, over 4 seeds: on combinations that were never trained 0.336 as it is, 0.296 with
the general prefix, 0.327 with modules, 0.392 with a prefix trained on the combination; on seen ones
0.336, 0.323, 0.374 and 0.394. That modules generalise is undecided by rank (0.032 ± 0.061 above the
general prefix; 9 seeds would decide) and held by what they are for: the part of an entry that the
task asks for is preferred by 0.567 of the queries, by 0.450 with the general prefix, by 0.684 where
the combination was seen. That a module can be interpreted held for tasks (without its module 0.040
worse, with another's 0.145; tasks with one answer have modules alike) and for domains barely (0.005
± 0.025 without it, 0.008 ± 0.008 with another's).
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
