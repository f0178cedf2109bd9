"""The files around the code agree with one another: versions, pins, and what a workflow runs."""

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(lines, version):
  """Those among requirements, comments and empty lines that a version of Python has."""
  found = [Requirement(line) for line in lines if line and not line.startswith("#")]
  return [r for r in found if r.marker is None or r.marker.evaluate({"python_version": version})]


def test_the_citation_is_of_this_version():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert citation["cff-version"] == "1.2.0"
  for field, value in (("title", "name"), ("version", "version"), ("license", "license")):
    assert citation[field] == PROJECT[value]


def test_the_workflow_runs_what_every_change_must_pass():
  workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
  (job,) = workflow["jobs"].values()
  assert job["steps"][-1] == {"run": ".ci/run"}
  assert job["env"]["PYTHON"] == "python${{ matrix.python }}"
  least = PROJECT["requires-python"].removeprefix(">=")
  assert job["strategy"]["matrix"]["python"][0] == least


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_scripts_install_one_version_of_what_is_required(version):
  pins = requirements((ROOT / "constraints.txt").read_text().splitlines(), version)
  versions = {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}
  assert len(versions) == len(pins)
  extras = PROJECT["optional-dependencies"]
  required = (ROOT / "requirements.txt").read_text().splitlines() + extras["test"] + extras["dev"]
  for wanted in requirements(required, version):
    if wanted.name != "torch":
      pinned = versions[canonicalize_name(wanted.name)]
      assert wanted.specifier.contains(pinned.removeprefix("==")), wanted
