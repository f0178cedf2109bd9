"""Entries of dictionaries and manuals: a name, a definition, and a detail.

They are cut out of what `sources.text` gives, and are the same wherever a package is the same. The
entries of a document are in one split. A name that several entries of a domain have is ambiguous,
and all of these are left out; of nearly equal texts, in whatever domains, the first stays, so that
no text is in both splits.
"""

import collections
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator

from effjax.core.known import number
from effjax.core.typing import Scalar, Size
from effjax.data import sources
from effjax.data.corpus import Document, check_split, fraction
from effjax.data.unlike import unlike

HELD_OUT = 0.2
PARTS = ("name", "definition", "detail")
LENGTHS = ((2, 80), (20, 300), (20, 300))  # characters of a part, from and to
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-ZÀ-Þ“«\"(])")

Texts = tuple[str, str, str]


@dataclasses.dataclass(frozen=True)
class Entry:
  """A name with what defines it and something more about it.

  Attributes:
    domain: the source of the text.
    title: of the document.
    name, definition, detail: a line each.
    split: "train" or "validation".

  Example:
    >>> entry = Entry("wordnet", "noun/1", "duress", "compulsory force", "under duress", "train")
    >>> entry.id
    'wordnet/noun/1/duress'
  """

  domain: str
  title: str
  name: str
  definition: str
  detail: str
  split: str

  @property
  def id(self) -> str:
    """The entry's name among all."""
    return f"{self.domain}/{self.title}/{self.name}"

  @property
  def texts(self) -> Texts:
    """Its parts, in the order of `PARTS`."""
    return self.name, self.definition, self.detail


def read(*domains: str, held_out: Scalar = HELD_OUT) -> tuple[Entry, ...]:
  """The entries of some sources of text, each of which is a domain.

  | source | name | definition | detail |
  |---|---|---|---|
  | `wordnet` | the words of a synset | its gloss | the first example |
  | `foldoc` | a headword | the first sentence | the second |
  | `manpages` | a term, an option, a heading | the first sentence | the second |
  | `python3.11-doc` | a heading, a signature | the first sentence | the second |
  | `debian-handbook`, `debian-handbook/fr-FR` … | a heading | the first sentence | the second |

  Args:
    domains: names of `sources.text`.
    held_out: the share of documents in the split "validation"; translations agree.

  Raises:
    ValueError: for none, one twice, one that has no entries, and a share out of range.
    FileNotFoundError: where a package cannot be had.
  """
  share = number("held_out", held_out, above=0, below=1)
  for domain in domains:
    if domain.partition("/")[0] not in READERS:
      raise ValueError(f"domain {domain!r} has no entries; allowed: {', '.join(READERS)}")
  if not domains or len(set(domains)) < len(domains):
    raise ValueError(f"domains {', '.join(domains) or '(none)'}; allowed: one or more, each once")
  texts = (document for domain in domains for document in sources.text(domain))
  return distinct(entry for document in texts for entry in cut(document, share))


def choose(
  entries: Iterable[Entry],
  *,
  domain: str | None = None,
  split: str | None = None,
  limit: Size | None = None,
) -> tuple[Entry, ...]:
  """The entries of one domain, one split, or both; at most `limit` of them.

  A limit takes them in the order of a hash of their ids: a smaller one takes a part of the same.

  Raises:
    ValueError: for an unknown split, a limit below 1, and where nothing is left.

  Example:
    >>> some = [Entry("a", "1", name, "A definition", "A detail", "train") for name in "xyz"]
    >>> [[entry.name for entry in choose(some, limit=limit)] for limit in (1, 2)]
    [['y'], ['y', 'x']]
  """
  check_split(split or "train")
  kept = [e for e in entries if domain in (None, e.domain) and split in (None, e.split)]
  if not kept:
    raise ValueError(f"no entry has domain={domain!r}, split={split!r}; allowed: those of entries")
  if limit is None:
    return tuple(kept)
  number("limit", limit, integer=True, least=1)
  return tuple(sorted(kept, key=lambda e: hashlib.sha256(e.id.encode()).digest())[:limit])


def distinct(entries: Iterable[Entry]) -> tuple[Entry, ...]:
  """Those whose name is theirs alone in their domain, and whose texts are unlike all before.

  Example:
    >>> entry = Entry("a", "1", "x", "One two three four five.", "Six seven.", "train")
    >>> other = dataclasses.replace(entry, name="y", definition="Five, four, three, two: one!")
    >>> [found.name for found in distinct([entry, other])]
    ['x']
  """
  once = {(entry.domain, *entry.texts): entry for entry in reversed(list(entries))}
  given = list(reversed(once.values()))
  named = collections.Counter((e.domain, e.name.casefold()) for e in given)
  given = [e for e in given if named[e.domain, e.name.casefold()] == 1]
  return tuple(given[place] for place in unlike([e.texts[1:] for e in given]))


def cut(document: Document, held_out: Scalar = HELD_OUT) -> Iterator[Entry]:
  """The entries of a document whose parts differ, and are neither too short nor too long."""
  split = "validation" if fraction(document) < held_out else "train"
  for texts in READERS[document.domain.partition("/")[0]](document.text):
    name, definition, detail = parts = tuple(" ".join(text.split()) for text in texts)
    fits = [low <= len(x) <= high for x, (low, high) in zip(parts, LENGTHS, strict=True)]
    if all(fits) and len(set(parts)) == len(parts):
      yield Entry(document.domain, document.title, name, definition, detail, split)


def _sentences(name: str, body: str) -> Iterator[Texts]:
  """A name with the first two sentences of a body; nothing where there are fewer."""
  found = _SENTENCE.split(" ".join(body.split()))
  if len(found) > 1:
    yield name, found[0], found[1]


def _wordnet(text: str) -> Iterator[Texts]:
  words, _, gloss = text.partition(": ")
  definition, *examples = re.split(r";\s*(?=\")", gloss.strip())
  if examples:
    yield words, definition, examples[0].strip('"')


def _foldoc(text: str) -> Iterator[Texts]:
  head, _, body = text.partition("\n\n")
  body = re.sub(r"^\s*(<[^>]*>)?\s*", "", body).partition("\n\n")[0]
  if not re.match(r"\d+\.", body):  # the first of several meanings
    yield from _sentences(head.partition("\n")[0], body)


def _manual(text: str) -> Iterator[Texts]:
  for block in text.split("\n\n"):
    name, _, body = block.strip().partition("\n")
    if len(name.split()) <= 4 and not name.endswith((".", ",", ";", ":")):
      yield from _sentences(name, body)


def _headed(text: str) -> Iterator[Texts]:
  for head, body in itertools.pairwise(text.strip().split("\n\n")):
    name = re.sub(r"^(?:\w+\.)+\s+", "", head)  # without the number of a section
    if re.match(r"\w[^\n]*[^\n.,;:!?]$", name):
      yield from _sentences(name, body)


READERS: dict[str, Callable[[str], Iterator[Texts]]] = {
  "wordnet": _wordnet,
  "foldoc": _foldoc,
  "manpages": _manual,
  "python3.11-doc": _headed,
  "debian-handbook": _headed,
}
