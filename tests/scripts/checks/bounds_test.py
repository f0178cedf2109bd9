"""A bound that is broken says so; the table tells what is reached from what is only kept."""

import pytest

from scripts.checks import bounds
from scripts.checks.bounds import Bound

BOUNDS = (
  Bound("fails", "", 0),
  Bound("spill", "^a100 .* keys$", 0, now=64),
  Bound("spill", "^(h100|a100)", 0),
  Bound("busy 4k", "causal", 0.95, least=True),
)
ROW = {"target": "h100", "case": "bfloat16-64-causal", "kernel": "forward"}


@pytest.fixture(autouse=True)
def bound(monkeypatch):
  monkeypatch.setattr(bounds, "BOUNDS", BOUNDS)


@pytest.mark.parametrize(
  "changes, wrong",
  [
    ({"spill": 0, "wait": None}, None),
    ({"spill": 8}, "h100 bfloat16-64-causal forward: spill 8, allowed at most 0"),
    ({"spill": 64, "target": "a100", "kernel": "keys"}, None),
    ({"spill": 65, "target": "a100", "kernel": "keys"}, "allowed at most 64"),
    ({"spill": 8, "target": "v5e"}, None),
    ({"busy 4k": 0.95}, None),
    ({"busy 4k": 0.94}, "busy 4k 0.94, allowed at least 0.95"),
    ({"error": "no registers left"}, "fails 1, allowed at most 0 no registers left"),
  ],
)
def test_what_is_broken(changes, wrong):
  found = bounds.broken([ROW | changes])
  assert found == [] if wrong is None else len(found) == 1 and wrong in found[0]


def test_the_worst_of_each_bound():
  spills = [ROW | {"spill": 4}, ROW | {"spill": 0, "busy 4k": 0.97}]
  keys = ROW | {"target": "a100", "kernel": "keys", "spill": 32}
  lines = bounds.table([*spills, keys]).splitlines()[2:]
  assert [line.split(" | ")[4:] for line in lines] == [
    ["0", "h100 bfloat16-64-causal forward", "yes |"],
    ["32", "a100 bfloat16-64-causal keys", "no |"],
    ["4", "h100 bfloat16-64-causal forward", "no |"],
    ["0.97", "h100 bfloat16-64-causal forward", "yes |"],
  ]
