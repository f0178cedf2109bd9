from pathlib import Path

import pytest

from effjax.data.cache import cache_dir, write_whole


def test_folder_follows_the_environment(monkeypatch):
  monkeypatch.setenv("EFFJAX_CACHE", "here")
  assert cache_dir() == Path("here")
  monkeypatch.delenv("EFFJAX_CACHE")
  monkeypatch.setenv("XDG_CACHE_HOME", "xdg")
  assert cache_dir() == Path("xdg/effjax")
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", "home")
  assert cache_dir() == Path("home/.cache/effjax")


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
  path = tmp_path / "deep" / "file"
  write_whole(path, lambda file: file.write(b"old"))

  def fail(file):
    file.write(b"half")
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write_whole(path, fail)
  assert path.read_bytes() == b"old"
  assert [p.name for p in path.parent.iterdir()] == ["file"]
