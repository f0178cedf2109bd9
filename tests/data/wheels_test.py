"""Small wheels made here are read; a stand-in for pip fetches them, and pip itself true ones."""

import dataclasses
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from effjax.data import sources, wheels
from effjax.data.corpus import SPLITS, Document

FILES = {
  "nltk/tree.py": "x = 'é'  \r\n",
  "nltk/test/tree.doctest": "Trees\n",
  "nltk/test/tree_test.py": "assert True\n",
  "nltk/cli/README.md": "# Use\n",
  "nltk/VERSION": "1\n",
  "nltk-3.9.1.dist-info/LICENSE.txt": "any\n",
}


def make_wheel(path):
  path.parent.mkdir(parents=True, exist_ok=True)
  with zipfile.ZipFile(path, "w") as archive:
    for name, text in FILES.items():
      archive.writestr(name, text.encode())
  return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def wheel(cache, monkeypatch):
  """A small stand-in for the wheel of nltk, in the cache."""
  path = cache / "wheels" / wheels.WHEELS["nltk"].file
  made = dataclasses.replace(wheels.WHEELS["nltk"], sha256=make_wheel(path))
  monkeypatch.setitem(wheels.WHEELS, "nltk", made)
  return path


def test_text_files_are_read_in_order_without_tests_and_metadata(wheel):
  assert sources.text("nltk").documents == (
    Document("nltk", "nltk/cli/README.md", "# Use\n"),
    Document("nltk", "nltk/test/tree.doctest", "Trees\n"),
    Document("nltk", "nltk/tree.py", "x = 'é'\n"),
  )


def test_another_file_under_that_name_is_refused_with_both_digests(wheel):
  expected = wheels.WHEELS["nltk"].sha256
  wheel.write_bytes(b"another")
  found = hashlib.sha256(b"another").hexdigest()
  with pytest.raises(ValueError, match=rf"nltk-3.*whl has SHA-256 {found}.*file with {expected}"):
    sources.text("nltk")


def test_a_wheel_is_fetched_once(wheel, monkeypatch):
  content, commands = wheel.read_bytes(), []
  wheel.unlink()

  def run(command, cwd, **kwargs):
    commands.append(command)
    Path(cwd, wheel.name).write_bytes(content)
    return subprocess.CompletedProcess(command, 0, "", "")

  monkeypatch.setattr(subprocess, "run", run)
  assert sources.text("nltk").documents == sources.text("nltk").documents
  (command,) = commands
  assert command[-1] == "nltk==3.9.1" and "--no-deps" in command


def test_a_failing_download_shows_why_and_where_the_file_may_be_put(cache, monkeypatch):
  failed = subprocess.CompletedProcess([], 1, "", "No module named pip")
  monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
  with pytest.raises(FileNotFoundError, match=r"named pip\n.*put networkx.* into .*wheels"):
    sources.text("libraries")
  assert not list((cache / "wheels").iterdir())


def test_the_libraries_have_the_text_they_had(monkeypatch):
  monkeypatch.delenv("EFFJAX_CACHE")  # fetched once a machine
  corpus = sources.text("libraries")
  assert corpus.domains == ("networkx", "nltk", "twisted")
  assert (len(corpus), corpus.nbytes) == (1070, 14_602_348)
  assert corpus.fingerprint == "84cd48f059e9097fd86320a175b591106c58e15ffddb4b818474ec1afa697bcd"
  shares = [corpus.select(split=split).nbytes / corpus.nbytes for split in SPLITS]
  assert 0.03 < shares[1] < 0.07
