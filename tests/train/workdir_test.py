"""Directories that belong to one configuration, and rows that survive a kill."""

import dataclasses
import errno
import os

import pytest

from effjax.train import workdir


@dataclasses.dataclass
class Config:
  seed: int = 0
  techniques: tuple[str, ...] = ()


def test_claim_writes_the_configuration_and_recognises_it(tmp_path):
  where = workdir.claim(tmp_path / "a" / "b", Config(seed=3))
  assert '"seed": 3' in (where / workdir.CONFIG).read_text()
  assert workdir.claim(where, Config(seed=3)) == where


def test_claim_names_each_field_that_differs(tmp_path):
  workdir.claim(tmp_path, Config())
  with pytest.raises(ValueError, match=r"seed is 0 there and 1 here, techniques is \[\] there"):
    workdir.claim(tmp_path, Config(seed=1, techniques=("x",)))


def test_free_fields_may_differ(tmp_path):
  workdir.claim(tmp_path, Config())
  workdir.claim(tmp_path, Config(techniques=("x",)), free=("techniques",))
  with pytest.raises(ValueError, match="seed"):
    workdir.claim(tmp_path, Config(seed=1), free=("techniques",))


def test_a_field_that_one_side_lacks_differs(tmp_path):
  workdir.claim(tmp_path, {"seed": 0})
  with pytest.raises(ValueError, match="steps is None there and 5 here"):
    workdir.claim(tmp_path, {"seed": 0, "steps": 5})


def test_a_line_cut_off_is_not_read_and_is_removed_by_the_next_append(tmp_path):
  path = tmp_path / workdir.METRICS
  workdir.append_row(path, {"step": 1})
  with open(path, "a") as file:
    file.write('{"step": 2, "lo' + "x" * 100_000)
  assert workdir.read_rows(path) == [{"step": 1}]
  workdir.append_row(path, {"step": 2})
  assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_file_that_holds_only_a_cut_line_starts_over(tmp_path):
  path = tmp_path / workdir.METRICS
  path.write_text('{"st')
  workdir.append_row(path, {"step": 1})
  assert workdir.read_rows(path) == [{"step": 1}]


def test_write_rows_replaces(tmp_path):
  path = tmp_path / workdir.METRICS
  for step in range(4):
    workdir.append_row(path, {"step": step})
  workdir.write_rows(path, [row for row in workdir.read_rows(path) if row["step"] < 2])
  assert workdir.read_rows(path) == [{"step": 0}, {"step": 1}]
  assert os.listdir(tmp_path) == [workdir.METRICS]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full, a full disk, is Linux's")
def test_a_full_disk_is_named(tmp_path):
  path = tmp_path / workdir.METRICS
  path.symlink_to("/dev/full")
  with pytest.raises(OSError, match=r"No space left on device.*metrics.jsonl") as caught:
    workdir.append_row(path, {"step": 1})
  assert caught.value.errno == errno.ENOSPC


def test_a_read_only_disk_is_named(tmp_path, monkeypatch):
  def refuse(*args, **kwargs):
    raise OSError(errno.EROFS, "Read-only file system")

  monkeypatch.setattr(workdir.Path, "mkdir", refuse)
  with pytest.raises(OSError, match=r"Read-only file system.*run"):
    workdir.claim(tmp_path / "run", Config())
