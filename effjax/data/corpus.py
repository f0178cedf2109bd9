"""Documents, corpora, and the split between training and validation text.

A document goes to validation if the SHA-256 of its source and title, read as a fraction of one, is
below `VALIDATION`. Membership depends on nothing else: not on the machine, the run, the seed or
which other documents are there; text of one's own can say otherwise, see `effjax.data.files`. A
corpus holds no two documents of equal text, so that no text is in both splits.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence

VALIDATION = 0.05
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Document:
  """A text with the domain it belongs to, a title unique in it, a label where it has one, and a
  split where its name does not decide that.

  >>> Document("pydoc", "assert", "The assert statement").id
  'pydoc/assert'
  """

  domain: str
  title: str
  text: str
  label: str | None = None
  split: str | None = None

  @property
  def id(self) -> str:
    """The document's name in a corpus."""
    return f"{self.domain}/{self.title}"


def _fraction(name: str) -> float:
  """A number in [0, 1) that looks uniform and depends on the name alone."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def split_of(document: Document) -> str:
  """The split a document belongs to: "train" or "validation".

  Parts of a source (the translations "debian-handbook/de-DE", "debian-handbook/fr-FR", …) agree:
  aligned documents are all in one split.

  >>> split_of(Document("pydoc", "assert", "…"))
  'train'
  """
  return document.split or ("validation" if fraction(document) < VALIDATION else "train")


def fraction(document: Document) -> float:
  """A number in [0, 1) that looks uniform and depends on a document's source and title alone."""
  source = document.domain.partition("/")[0]
  return _fraction(f"{source}/{document.title}")


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents in a fixed order; empty ones and repeated texts are dropped on construction.

  Raises ValueError where no document is left.

  >>> corpus = Corpus("demo", [Document("a", "1", "hello"), Document("b", "1", "hello")])
  >>> len(corpus), corpus.domains
  (1, ('a',))
  """

  name: str
  documents: Sequence[Document]

  def __post_init__(self):
    kept = {}
    for document in self.documents:
      if document.text.strip():
        kept.setdefault(document.text, document)
    if not kept:
      raise ValueError(f"corpus {self.name!r} is empty: it needs at least one document with text")
    object.__setattr__(self, "documents", tuple(kept.values()))

  def __len__(self) -> int:
    return len(self.documents)

  def __repr__(self) -> str:
    size = f"{len(self)} documents, {self.nbytes:,} bytes"
    return f"Corpus({self.name!r}, {size}, domains: {', '.join(self.domains[:4])}{self._more})"

  @property
  def _more(self) -> str:
    return f", … ({len(self.domains)} in all)" if len(self.domains) > 4 else ""

  def __iter__(self) -> Iterator[Document]:
    return iter(self.documents)

  @functools.cached_property
  def domains(self) -> tuple[str, ...]:
    """The domains of the documents, sorted."""
    return tuple(sorted({document.domain for document in self.documents}))

  @functools.cached_property
  def nbytes(self) -> int:
    """Bytes of text in UTF-8."""
    return sum(len(document.text.encode()) for document in self.documents)

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of all ids and texts in order, in hexadecimal."""
    digest = hashlib.sha256()
    for document in self.documents:
      for part in (document.id.encode(), document.text.encode()):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()

  def select(self, *, split: str | None = None, domain: str | None = None) -> "Corpus":
    """The documents of one split, one domain, or both.

    Raises ValueError for an unknown split or domain, and where nothing is left.

    >>> corpus = Corpus("demo", [Document("a", "1", "one"), Document("b", "1", "two")])
    >>> [document.text for document in corpus.select(domain="b")]
    ['two']
    """
    check_split(split or "train")
    if domain is not None and domain not in self.domains:
      raise ValueError(
        f"domain {domain!r} is not in corpus {self.name!r}; its domains: {', '.join(self.domains)}"
      )
    kept = tuple(
      document
      for document in self.documents
      if (domain is None or document.domain == domain)
      and (split is None or split_of(document) == split)
    )
    where = " ".join(part for part in (self.name, domain, split) if part)
    return Corpus(where, kept)

  def limited(self, limit_bytes: int) -> "Corpus":
    """A miniature of at most `limit_bytes`: every domain and split shrinks by the same factor.

    Within a domain and split, documents are taken in the order of a hash of their id, the last
    one cut at the end of a line; they keep the order of this corpus.
    Raises ValueError unless `limit_bytes` is positive.

    >>> corpus = Corpus("demo", [Document("a", str(i), f"line {i}\\n" * 9) for i in range(50)])
    >>> small = corpus.limited(1000)
    >>> 900 < small.nbytes <= 1000
    True
    """
    if limit_bytes < 1:
      raise ValueError(f"limit_bytes is {limit_bytes}; it must be at least 1")
    if self.nbytes <= limit_bytes:
      return self
    cells: dict[tuple[str, str], list[int]] = {}
    for index, document in enumerate(self.documents):
      cells.setdefault((document.domain, split_of(document)), []).append(index)
    chosen: dict[int, Document] = {}
    for members in cells.values():
      chosen.update(self._fill(members, limit_bytes / self.nbytes))
    return Corpus(self.name, tuple(chosen[index] for index in sorted(chosen)))

  def _fill(self, members: list[int], factor: float) -> dict[int, Document]:
    sizes = {index: len(self.documents[index].text.encode()) for index in members}
    room = int(factor * sum(sizes.values()))
    chosen = {}
    for index in sorted(members, key=lambda index: _fraction("sample " + self.documents[index].id)):
      document = self.documents[index]
      if sizes[index] > room:
        chosen[index] = dataclasses.replace(document, text=_cut(document.text, room))
        break
      chosen[index] = document
      room -= sizes[index]
    return chosen


def _cut(text: str, nbytes: int) -> str:
  """The start of a text: whole lines where one fits, else whole characters."""
  start = text.encode()[:nbytes].decode(errors="ignore")
  return start[: start.rfind("\n") + 1] or start


def check_split(split: str) -> None:
  """Raises ValueError unless `split` is "train" or "validation"."""
  if split not in SPLITS:
    raise ValueError(f"split {split!r} is unknown; allowed: {', '.join(SPLITS)}")


def combine(name: str, corpora: Iterable[Corpus]) -> Corpus:
  """One corpus of the documents of several, in order.

  >>> one = Corpus("one", [Document("a", "1", "one")])
  >>> two = Corpus("two", [Document("b", "1", "two")])
  >>> combine("both", [one, two]).domains
  ('a', 'b')
  """
  return Corpus(name, tuple(document for corpus in corpora for document in corpus))
