import json

import pytest

from effjax.data import debian, sources
from effjax.data.corpus import SPLITS


@pytest.fixture(scope="module")
def embedded():
  return sources.text("embedded")


def test_embedded_is_code_and_prose_of_at_most_four_megabytes(embedded):
  assert embedded.domains == ("pydoc", "stdlib")
  assert 3_900_000 < embedded.nbytes <= 4_000_000
  for split in SPLITS:
    assert embedded.select(split=split).domains == ("pydoc", "stdlib")


def test_embedded_is_the_same_every_time(embedded):
  assert sources.text().fingerprint == embedded.fingerprint


def test_the_library_is_read_without_tests_and_machine_specific_files():
  corpus = sources.text("stdlib")
  titles = [d.title for d in corpus]
  assert titles == sorted(titles, key=lambda title: tuple(title.split("/")))
  assert {"argparse.py", "asyncio/base_events.py", "json/decoder.py"} <= set(titles)
  assert not any(
    "/test/" in title or "/tests/" in title or title.startswith("_sysconfigdata")
    for title in titles
  )
  assert "class ArgumentParser" in next(d.text for d in corpus if d.title == "argparse.py")


def test_several_sources_are_one_corpus(tmp_path):
  (tmp_path / "notes.txt").write_text("my notes\n" * 1000)
  corpus = sources.text("pydoc", f"path:{tmp_path}/notes.txt", limit_bytes=30_000)
  assert corpus.domains == ("notes.txt", "pydoc")
  assert corpus.nbytes <= 30_000


def test_a_folder_is_read_in_order_by_suffix(tmp_path):
  (tmp_path / "b").mkdir()
  (tmp_path / "b" / "x.html").write_text("<p>page</p><script>no</script>")
  (tmp_path / "a.md").write_text("# Title\r\n")
  (tmp_path / "c.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
  (tmp_path / "image.png").write_bytes(b"\xff\x00")
  corpus = sources.text(f"path:{tmp_path}")
  assert [(d.title, d.text) for d in corpus] == [
    ("a.md", "# Title\n"), ("b/x.html", "page\n"), ("c.jsonl:1", "one\n"), ("c.jsonl:3", "two\n"),
  ]  # fmt: skip
  assert corpus.domains == (tmp_path.name,)


def test_one_long_file_gives_both_splits_something_and_loses_nothing(tmp_path):
  lines = "".join(f"line {number} of a long file\n" for number in range(30_000))
  (tmp_path / "long.txt").write_text(lines)
  corpus = sources.text(f"path:{tmp_path}/long.txt")
  assert "".join(d.text for d in corpus) == lines
  assert all(len(corpus.select(split=split)) for split in SPLITS)


def test_unknown_names_list_the_known_ones():
  with pytest.raises(ValueError, match=r"'wikipedia' is unknown; allowed: embedded, .*path:"):
    sources.text("wikipedia")


def test_every_debian_source_is_listed():
  assert set(debian.PACKAGES) < set(sources.names())


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("empty.txt", b"", "is empty"),
    ("latin.txt", b"caf\xe9", r"latin\.txt is not UTF-8 text: byte 3"),
    ("bad.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"bad\.jsonl, line 2"),
    ("bad.jsonl", b"{not json", r"bad\.jsonl, line 1"),
    ("bad.jsonl", json.dumps({"text": 3}).encode(), r"bad\.jsonl, line 1"),
  ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    sources.text(f"path:{tmp_path}/{name}")


def test_missing_paths_and_folders_without_text_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such file or folder"):
    sources.text(f"path:{tmp_path}/nothing")
  with pytest.raises(ValueError, match=r"no file ends in \.txt"):
    sources.text(f"path:{tmp_path}")
