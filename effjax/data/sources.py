"""Text sources by name.

| name | what it is | where it comes from |
|---|---|---|
| `embedded` | 4 MB of `stdlib` and `pydoc` (the default) | this Python |
| `stdlib` | the standard library's source, a document a file | this Python |
| `pydoc` | the language reference behind `help()`, a document a topic | this Python |
| `libraries` | 14 MB of code and documentation: the three below | package index |
| `networkx` | a library of graphs and their algorithms, a document a file | package index |
| `nltk` | a library of natural language processing, a document a file | package index |
| `twisted` | a library of networking, a document a file | package index |
| `debian-handbook` | a book; `debian-handbook/fr-FR` for a translation | Debian |
| `python3.11-doc` | the Python documentation | Debian |
| `manpages` | the Linux manual pages, sections 4, 5 and 7 | Debian |
| `foldoc` | The Free On-line Dictionary of Computing | Debian |
| `fortunes` | quotations, labelled by collection | Debian |
| `anarchism` | An Anarchist FAQ | Debian |
| `austen` | Jane Austen's six novels, a document a chapter, labelled by novel | Debian |
| `wordnet` | glosses of WordNet 3.0, labelled by lexicographer file | Debian |
| `path:FILE_OR_FOLDER` | your own .txt .md .rst .py .html .htm .jsonl files | disk |

A twentieth of your own text is held out: whole documents, or the end of each where there are too
few. `path:FILE_OR_FOLDER?validation=0.2` holds out another share, and
`path:FILE_OR_FOLDER?validation=OTHER_FILE_OR_FOLDER` that text and no other.

What comes from the package index is the same text on every machine: its bytes are checked against a
digest. The text of `stdlib` and `pydoc`, which need nothing, is that of the Python that runs (the
same on every machine with the same Python version); optional parts that distributions leave out,
tests and tables are not read.
"""

import os
import pydoc_data.topics
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from effjax.data import cleaning, debian, files, wheels
from effjax.data.corpus import Corpus, Document, combine

EMBEDDED_BYTES = 4_000_000

_LEFT_OUT_MODULES = {
  "test", "idlelib", "tkinter", "turtledemo", "turtle", "lib2to3", "distutils", "ensurepip",
  "encodings", "pydoc_data", "sitecustomize", "usercustomize", "antigravity", "this",
}  # fmt: skip
_LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages"}


def _is_read(path: Path) -> bool:
  """Whether a file of the library, by its path inside the library, belongs to the source."""
  top = path.parts[0].removesuffix(".py")
  return path.suffix == ".py" and top in sys.stdlib_module_names and top not in _LEFT_OUT_MODULES


def _stdlib() -> Iterator[Document]:
  root = Path(sysconfig.get_paths()["stdlib"])
  found = []
  for folder, subfolders, here in os.walk(root):
    subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT_FOLDERS]
    found += [Path(folder, name).relative_to(root) for name in here]
  if not any(path.suffix == ".py" for path in found):
    raise FileNotFoundError(f"this Python has no source files of its library in {root}")
  for path in sorted(filter(_is_read, found)):
    with tokenize.open(root / path) as file:
      yield Document("stdlib", path.as_posix(), cleaning.normalise(file.read()))


def _pydoc() -> Iterator[Document]:
  for topic, text in sorted(pydoc_data.topics.topics.items()):
    yield Document("pydoc", topic, cleaning.normalise(text))


def names() -> tuple[str, ...]:
  """The names `text` knows, besides `path:…` and translations such as `debian-handbook/fr-FR`.

  >>> names()[:4]
  ('embedded', 'stdlib', 'pydoc', 'libraries')
  """
  return ("embedded", "stdlib", "pydoc", "libraries", *wheels.WHEELS, *debian.PACKAGES)


def _source(name: str) -> Corpus:
  if name.startswith("path:"):
    return files.read(name)
  if name.partition("/")[0] in debian.PACKAGES:
    return Corpus(name, tuple(debian.read(name)))
  if name in wheels.WHEELS:
    return Corpus(name, tuple(wheels.read(name)))
  match name:
    case "libraries":
      return combine(name, map(_source, wheels.WHEELS))
    case "stdlib":
      return Corpus(name, tuple(_stdlib()))
    case "pydoc":
      return Corpus(name, tuple(_pydoc()))
    case "embedded":
      return combine(name, [_source("stdlib"), _source("pydoc")]).limited(EMBEDDED_BYTES)
  raise ValueError(f"text source {name!r} is unknown; allowed: {', '.join(names())}, path:…")


def text(*sources: str, limit_bytes: int | None = None) -> Corpus:
  """The text of one or several sources; each source is a domain of the corpus.

  Documents come in a fixed order. With `limit_bytes` the corpus is a miniature of at most that
  size, in which every domain and split keeps its share.
  Raises ValueError for an unknown name or an empty corpus, FileNotFoundError for a path that does
  not exist or a package that cannot be had.

  >>> corpus = text("embedded", limit_bytes=100_000)
  >>> corpus.domains
  ('pydoc', 'stdlib')
  >>> corpus.nbytes <= 100_000
  True
  """
  sources = sources or ("embedded",)
  corpora = [_source(name) for name in sources]
  corpus = corpora[0] if len(corpora) == 1 else combine("+".join(sources), corpora)
  return corpus if limit_bytes is None else corpus.limited(limit_bytes)
