"""Do modules for a domain and a task add up to one for a combination that was never trained?

  scripts/run modular_retrieval                                              (5 minutes)

Modular Retrieval (arXiv 2303.13419) puts a prefix before queries, P_general + P_domain + P_task,
and trains it in two stages, first the general one on all that there is, then the modules. Here the
encoder is all-MiniLM-L6-v2, frozen, and documents take no prefix. Entries of WordNet, FOLDOC, the
Linux manual pages and the Python documentation have a name, a definition and a detail, and four
tasks ask with one of them for another: "define" (name → definition), "expand" (name → detail),
"name" (definition → name), "continue" (definition → detail). All parts of all held-out entries are
in one pool, so that nothing but its module can tell a query which part is wanted. Each seed leaves
one task out of each domain, another one in each seed, and asks for these too.

From the first stage all others go on for as many steps: the general prefix, the modules, and a
prefix for one combination alone, which no composition is expected to reach. Weights of all modules
are learned on a combination too, a quarter as long. A seed's rows differ in nothing else.
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
  folder = files.claim(workdir, config, free=("seeds",))
  provenance.write(folder, study.shared.grid.corpus)
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
