"""Flags, names, rows that resume, tables, plots and disks that cannot be written."""

import csv
import errno
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from effjax.parallel import simulate_devices
from effjax.train import workdir
from experiments import harness
from experiments.lab.plots import Axis, Panel, Series
from experiments.lab.verdicts import less

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import dataclasses, sys
from experiments import harness
from experiments.lab.verdicts import less
@dataclasses.dataclass
class Config:
  seed: int = 0
  names: str = "all"
def run(config, folder):
  harness.chosen(config.names, ["lora", "int8"], what="technique")
  if config.seed == 7:
    raise FloatingPointError("loss is nan at step 3")
  print(config.seed, config.names, folder)
  return []
harness.main(run, Config())
"""


def command(tmp_path, *arguments: str) -> subprocess.CompletedProcess:
  script = tmp_path / "trial.py"
  script.write_text(PROGRAM)
  environment = {"PYTHONPATH": str(ROOT), "PATH": "", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
  return subprocess.run(
    [sys.executable, str(script), *arguments],
    capture_output=True, text=True, env=environment, cwd=tmp_path,
  )  # fmt: skip


def test_flags_reach_the_experiment(tmp_path):
  done = command(tmp_path, "--config.seed=3", "--config.names=int8", "--workdir=here")
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == ["3", "int8", "here"]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("argument", "said"),
  [
    ("--config.sed=3", "unknown flag --config.sed; allowed: --config.seed, --config.names"),
    ("--config.names=qlora", "unknown technique 'qlora'; allowed: all, lora, int8"),
    ("--config.seed=x", "invalid literal for int"),
    ("--wrkdir=x", "Unknown command line flag 'wrkdir'"),
    ("stray", "unknown argument 'stray'"),
    ("--config.seed=7", "error: loss is nan at step 3"),
  ],
)
def test_a_wrong_argument_ends_in_one_clear_line(tmp_path, argument, said):
  done = command(tmp_path, argument)
  assert done.returncode != 0
  assert said in done.stdout + done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
  ("script", "kind", "known"), [("run", "experiment", "survey"), ("bench", "benchmark", "decode")]
)
def test_an_unknown_script_is_refused_with_the_names(script, kind, known):
  done = subprocess.run([ROOT / "scripts" / script, "mamba2"], capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr.startswith(f"error: unknown {kind} 'mamba2'; allowed: ")
  assert known in done.stderr


def test_chosen_keeps_the_order_of_the_registry():
  assert harness.chosen("c, a", ["a", "b", "c"], what="x") == ["a", "c"]
  assert harness.chosen("all", ["a", "b"], what="x") == ["a", "b"]


@pytest.mark.parametrize("text", ["", "d", "a,d", ","])
def test_chosen_names_what_is_allowed(text):
  with pytest.raises(ValueError, match=r"unknown row .*allowed: all, a, b"):
    harness.chosen(text, ["a", "b"], what="row")


def test_compute_resumes_after_a_failure(tmp_path):
  calls = []

  def task(name, *, fails=False):
    def call():
      calls.append(name)
      if fails:
        raise KeyboardInterrupt
      return {"value": len(calls)}

    return call

  with pytest.raises(KeyboardInterrupt):
    harness.compute(tmp_path, {"a": task("a"), "b": task("b", fails=True), "c": task("c")})
  rows = harness.compute(tmp_path, {"a": task("a"), "b": task("b"), "c": task("c")})
  assert calls == ["a", "b", "b", "c"]
  assert [row["name"] for row in rows] == ["a", "b", "c"]
  assert rows == workdir.read_rows(tmp_path / workdir.METRICS)


def test_compute_leaves_out_rows_that_were_not_asked_for(tmp_path):
  workdir.append_row(tmp_path / workdir.METRICS, {"name": "old", "value": 1})
  rows = harness.compute(tmp_path, {"new": lambda: {"value": 2}})
  assert rows == [{"name": "new", "value": 2}]


def test_csv_has_every_column(tmp_path):
  harness.write_csv(tmp_path, [{"a": 1}, {"a": 2, "b": "x,y"}])
  with open(tmp_path / "result.csv") as file:
    assert list(csv.DictReader(file)) == [{"a": "1", "b": ""}, {"a": "2", "b": "x,y"}]


def test_finish_says_what_held(tmp_path, capsys):
  claims = {"up is up": True, "down is up": False, "left is up": less([1.0], [2.0])}
  harness.finish(tmp_path, [{"a": 1.25}], {"a": ".1f", "b": ".1f"}, claims)
  printed = capsys.readouterr().out
  assert "1.2  –" in printed
  assert "held:         up is up" in printed
  assert "did NOT hold: down is up" in printed
  assert "undecided:    left is up (-1.0000; one seed has no interval)" in printed


def test_plot_is_drawn_from_the_file_alone(tmp_path):
  workdir.append_row(tmp_path / workdir.METRICS, {"x": 1.0, "y": 2.0})
  seen = []

  def panels(rows):
    seen.extend(rows)
    points = Series("kind", [1.0, 1.0], [2.0, 2.0], names=["one", "two"])
    return [Panel("Title", Axis("x"), Axis("y"), [points])]

  path = harness.plot(tmp_path, panels)
  assert seen == [{"x": 1.0, "y": 2.0}]
  assert path.read_bytes()[:4] == b"\x89PNG"


def test_a_plot_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "plot.png").mkdir()
  with pytest.raises(OSError, match=r"cannot write.*plot\.png") as caught:
    harness.plot(tmp_path, lambda rows: [])
  assert caught.value.errno == errno.EISDIR


def test_too_few_devices_are_refused():
  jax.devices()  # the process has begun
  with pytest.raises(ValueError, match="9 CPU devices are asked for"):
    simulate_devices(9)
