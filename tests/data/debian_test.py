"""Readers run on small trees laid out as the packages are; fetching runs a stand-in for apt-get."""

import base64
import gzip
import shutil
import subprocess

import pytest

from effjax.data import debian, sources


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())


def handbook(root, language="en-US"):
  folder = root / f"usr/share/doc/debian-handbook/html/{language}"
  write(folder / "index.html", '<a href="z.html#x">1</a><a href="a.html">2</a>')
  write(folder / "a.html", "<h1>Second</h1>")
  write(folder / "z.html", "<h1>First</h1>")


def read(source, root, part=""):
  return list(debian.PACKAGES[source].read(root, source, part))


def test_the_handbook_is_read_in_the_order_of_its_contents(tmp_path):
  handbook(tmp_path)
  documents = read("debian-handbook", tmp_path, "en-US")
  assert [(d.title, d.text) for d in documents] == [("z.html", "First\n"), ("a.html", "Second\n")]
  with pytest.raises(ValueError, match="no translation 'xx'; it has: en-US"):
    read("debian-handbook", tmp_path, "xx")


def test_python_documentation_and_faq_leave_out_indexes(tmp_path):
  doc = tmp_path / "usr/share/doc"
  for name in ("library/re.html", "genindex-A.html", "search.html"):
    write(doc / "python3.11/html" / name, "<nav>n</nav><div role='main'><p>regular</p></div>")
  write(doc / "anarchism/html/secA1.html", "<p>section</p>")
  write(doc / "anarchism/html/links.html", "<p>links</p>")
  assert [d.title for d in read("python3.11-doc", tmp_path)] == ["library/re.html"]
  assert [d.text for d in read("anarchism", tmp_path)] == ["section\n"]


def test_manual_pages_are_read_once(tmp_path):
  page = tmp_path / "usr/share/man/man7/fifo.7.gz"
  write(page, gzip.compress(b".TH fifo 7\n.SH NAME\nfifo \\- pipe"))
  (page.parent / "alias.7.gz").symlink_to(page)
  assert [(d.title, d.text) for d in read("manpages", tmp_path)] == [
    ("fifo.7", "NAME\nfifo - pipe\n")
  ]


def dictd(value):
  return base64.b64encode(value.to_bytes(6, "big")).decode().lstrip("A") or "A"


def test_dictionary_entries_come_once_in_order_without_the_header(tmp_path):
  entries = [("00-database-info", b"header\n"), ("b", b"about {b}\n"), ("a", b"about a\n")]
  index, body = [], b""
  for word, text in entries:
    index.append(f"{word}\t{dictd(len(body))}\t{dictd(len(text))}")
    body += text
  index.append(index[1].replace("b", "synonym", 1))
  write(tmp_path / "usr/share/dictd/foldoc.index", "\n".join(index))
  write(tmp_path / "usr/share/dictd/foldoc.dict.dz", gzip.compress(body))
  assert [d.text for d in read("foldoc", tmp_path)] == ["about b\n", "about a\n"]


def test_quotations_are_labelled_by_collection(tmp_path):
  write(tmp_path / "usr/share/games/fortunes/wisdom", "one\n%\ntwo\nlines\n%\n")
  write(tmp_path / "usr/share/games/fortunes/wisdom.dat", b"\x00")
  documents = [d for d in read("fortunes", tmp_path) if d.text]
  assert [(d.text, d.label) for d in documents] == [("one\n", "wisdom"), ("two\nlines\n", "wisdom")]


def test_glosses_are_labelled_by_lexicographer_file(tmp_path):
  for name in ("noun", "verb", "adj", "adv"):
    write(tmp_path / "usr/share/wordnet" / f"data.{name}", "  1 licence\n")
  write(
    tmp_path / "usr/share/wordnet/data.noun",
    "  1 licence\n02084071 05 n 02 dog 0 domestic_dog 0 001 @ 02083346 n 0000 | a canine  \n",
  )
  (document,) = read("wordnet", tmp_path)
  assert (document.text, document.label) == ("dog, domestic dog: a canine\n", "noun.animal")


def test_novels_are_cut_at_chapters(tmp_path, monkeypatch):
  lines = ["EMMA", "", "CHAPTER I", "one", "CHAPTER II", "two"]
  monkeypatch.setattr(debian.rdata, "read_package_data", lambda index: {"emma": lines})
  assert [d.text for d in read("austen", tmp_path)] == [
    "EMMA\n", "CHAPTER I\none\n", "CHAPTER II\ntwo\n",
  ]  # fmt: skip


@pytest.fixture
def apt(tmp_path, monkeypatch):
  """Stands in for apt-get and dpkg-deb; returns the commands that were run."""
  commands = []

  def run(command, cwd=None, **kwargs):
    commands.append(command[0])
    if command[0] == "apt-get":
      (cwd_path := tmp_path.__class__(cwd) / f"{command[2]}_1_all.deb").write_text("deb")
      assert cwd_path.exists()
    else:
      handbook(tmp_path.__class__(command[3]))
      handbook(tmp_path.__class__(command[3]), "fr-FR")
    return subprocess.CompletedProcess(command, 0, "", "")

  monkeypatch.setattr(shutil, "which", lambda name: name)
  monkeypatch.setattr(subprocess, "run", run)
  return commands


def test_a_package_is_fetched_once_and_cleaned_once(apt, cache):
  first = sources.text("debian-handbook")
  assert apt == ["apt-get", "dpkg-deb"]
  assert sources.text("debian-handbook").documents == first.documents
  assert sources.text("debian-handbook/fr-FR").domains == ("debian-handbook/fr-FR",)
  assert apt == ["apt-get", "dpkg-deb", "dpkg-deb"]
  assert sorted(path.name for path in (cache / "text/1").iterdir()) == [
    "debian-handbook.jsonl", "debian-handbook_fr-FR.jsonl",
  ]  # fmt: skip


def test_a_package_given_as_a_file_needs_no_apt(apt, cache):
  write(cache / "debian/debian-handbook_9_all.deb", b"deb")
  sources.text("debian-handbook")
  assert apt == ["dpkg-deb"]


def test_no_apt_says_what_to_do(monkeypatch, cache):
  monkeypatch.setattr(shutil, "which", lambda name: None)
  with pytest.raises(FileNotFoundError, match=r"r-cran-janeaustenr.*put the package's \.deb file"):
    sources.text("austen")


def test_a_failing_download_shows_why(monkeypatch, cache):
  failed = subprocess.CompletedProcess([], 100, "", "E: Unable to locate package")
  monkeypatch.setattr(shutil, "which", lambda name: name)
  monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
  with pytest.raises(FileNotFoundError, match=r"Unable to locate package\n.*apt-get update"):
    sources.text("wordnet")
  assert not list((cache / "debian").iterdir())


def test_a_broken_package_is_named(monkeypatch, cache):
  write(cache / "debian/wordnet-base_1_all.deb", b"half")
  failed = subprocess.CompletedProcess([], 2, "", "unexpected end of file")
  monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
  monkeypatch.setattr(shutil, "which", lambda name: name)
  with pytest.raises(ValueError, match=r"wordnet-base_1_all\.deb is not a whole Debian package"):
    sources.text("wordnet")


def test_only_the_handbook_has_parts():
  with pytest.raises(ValueError, match="'austen' has no parts; given 'austen/emma'"):
    sources.text("austen/emma")


@pytest.mark.slow
def test_the_real_package_of_novels_is_read():
  if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
    pytest.skip("needs apt-get and dpkg-deb")
  try:
    corpus = sources.text("austen")
  except FileNotFoundError as error:
    pytest.skip(f"the package cannot be fetched here: {error}")
  novels = {d.label for d in corpus}
  assert len(novels) == 6 and corpus.nbytes > 4_000_000
  assert any("It is a truth universally acknowledged" in d.text for d in corpus)
