"""Schemes on a tiny random model: what is counted, who is calibrated, what is claimed."""

import dataclasses
import math

import numpy as np
import pytest

from effjax.core import trees
from effjax.quant import Int4, Int8
from experiments import harness
from experiments.lab.subject import load
from experiments.quant import quantize as study
from experiments.quant.schemes import BASELINE, LINEAR, SCHEMES

TINY = study.Config(
  model="tiny", text="stdlib", rows=1, length=32, calibration=1, decode=1, schemes="int4-gptq"
)


def test_a_run_says_what_bits_cost(tmp_path):
  rows = study.run(TINY, str(tmp_path))
  exact, rounded = rows
  assert [row["name"] for row in rows] == [BASELINE, "int4-gptq"]
  assert (exact["bits"], exact["error"], exact["ratio"], exact["decode"]) == (32, 0, 1, 1)
  assert rounded["bits"] == 4 + 32 / 64 and 0.01 < rounded["error"] < 0.3
  assert rounded["ratio"] == pytest.approx(rounded["perplexity"] / exact["perplexity"])
  assert rounded["bytes"] < exact["bytes"] / 3
  assert {"metrics.jsonl", "plot.png", "result.csv"} <= {path.name for path in tmp_path.iterdir()}


def test_bits_and_errors_are_those_of_the_linear_layers():
  subject, _ = load("tiny")
  changed = SCHEMES["int8"](subject, None, "int8")
  sizes = study.sizes(changed, subject)
  exact, linear = (trees.select(each.params, LINEAR) for each in (subject, changed))
  assert all(isinstance(leaf, Int8) for leaf in linear.values())
  off = [np.square(np.asarray(linear[path]) - np.asarray(w)).sum() for path, w in exact.items()]
  norm = sum(float((np.asarray(w) ** 2).sum()) for w in exact.values())
  assert sizes["error"] == pytest.approx(math.sqrt(sum(off) / norm), rel=1e-5)
  scales = sum(w.size // w.shape[-2] for w in exact.values())
  assert sizes["bits"] == 8 + 32 * scales / sum(w.size for w in exact.values())


@pytest.mark.parametrize("table", ["int4", None])
def test_the_table_is_quantised_as_asked(table):
  subject, _ = load("tiny")
  changed = SCHEMES["nf4"](subject, None, table)
  embedding = trees.select(changed.params, r"embedding$")
  assert all(isinstance(leaf, Int4) == (table == "int4") for leaf in embedding.values())
  assert SCHEMES[BASELINE](subject, None, table).params is subject.params


def test_claims_are_about_what_was_chosen():
  row = lambda name, ratio: {"name": name, "ratio": ratio}
  found = study.claims([row(BASELINE, 1.0), row("int8", 1.006), row("int4", 1.2)])
  assert found == {"int8: within 0.5 % of float32": False}
  found = study.claims([row("int4", 1.2), row("int4-gptq", 1.1), row("nf4", 1.15), row("fp4", 1.3)])
  assert list(found.values()) == [True, True] and "GPTQ" in list(found)[1]


def test_bad_input_is_named(tmp_path):
  for message, change in {
    "unknown scheme 'int3'": {"schemes": "int3"},
    "table='int3'; allowed: .*int8": {"table": "int3"},
  }.items():
    with pytest.raises(ValueError, match=message):
      study.run(dataclasses.replace(TINY, **change), str(tmp_path))
  assert not harness.files.read_rows(tmp_path / harness.files.METRICS)
