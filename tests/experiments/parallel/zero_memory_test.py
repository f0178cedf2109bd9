"""The published table in full, and a small run of everything."""

import jax
import pytest

from effjax.train import workdir
from experiments import harness
from experiments.parallel import zero_memory


@pytest.mark.parametrize("dp", zero_memory.PUBLISHED)
def test_every_published_cell_comes_out(dp):
  for size in zero_memory.SIZES:
    for part in zero_memory.STAGES:
      row = zero_memory.cell(size, part, dp)
      assert row["agrees"], row


def test_a_cell_that_is_off_by_one_printed_digit_does_not_agree(monkeypatch):
  monkeypatch.setitem(zero_memory.PUBLISHED, 64, "31.5 16.6 1.88 536 284 32 4187 2219 251")
  assert zero_memory.cell("7.5B", "os", 64)["agrees"]
  assert not zero_memory.cell("1T", "os+g+p", 64)["agrees"]
  assert zero_memory.cell("1T", "os+g", 64)["agrees"]  # 2218.75 may be cut off or rounded


def test_a_run_measures_places_and_resumes(tmp_path, capsys):
  config = zero_memory.Config(width=32, layers=1, vocab=64)
  rows = zero_memory.run(config, str(tmp_path))
  placed = [row for row in rows if "ratio" in row]
  assert len(rows) == 54 + 4
  assert [round(row["ratio"], 2) for row in placed] == [1.0] * 4
  assert placed[3]["device_bytes"] < placed[0]["device_bytes"] / 7
  assert "did NOT hold" not in capsys.readouterr().out
  for name in ("config.json", "metrics.jsonl", "result.csv", "plot.png"):
    assert (tmp_path / name).stat().st_size > 0
  assert zero_memory.run(config, str(tmp_path)) == rows
  assert len(workdir.read_rows(tmp_path / "metrics.jsonl")) == len(rows)


def test_another_configuration_is_refused(tmp_path):
  workdir.claim(tmp_path, zero_memory.Config(width=32))
  with pytest.raises(ValueError, match="width is 32 there and 64 here"):
    zero_memory.run(zero_memory.Config(width=64), str(tmp_path))


def test_more_devices_than_there_are_is_refused(tmp_path):
  jax.devices()  # the process has begun
  with pytest.raises(ValueError, match="64 CPU devices"):
    zero_memory.run(zero_memory.Config(devices=64), str(tmp_path))


def test_the_table_marks_cells_that_disagree():
  rows = [zero_memory.cell("7.5B", "os", dp) for dp in zero_memory.PUBLISHED]
  rows[0]["agrees"] = False
  assert "120.00*" in zero_memory.published_table(rows)
  assert harness.table([], {"a": ""}).startswith("a")
