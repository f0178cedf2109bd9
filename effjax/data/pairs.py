"""Retrieval tasks over entries: which part is asked by which, and what else lies in the pool.

In a pool all parts of its entries are documents. A name may ask for the definition or for the
detail, and only the task says for which: the other parts of its entry are the hardest of the wrong
answers. So a domain and a task are two attributes of a query that a model can be told of.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from effjax.core.known import number
from effjax.core.typing import Size
from effjax.data.entries import Entry

TASKS = {  # name → the part that asks, and the part that answers
  "define": ("name", "definition"),
  "expand": ("name", "detail"),
  "name": ("definition", "name"),
  "continue": ("definition", "detail"),
  "recall": ("detail", "name"),
  "explain": ("detail", "definition"),
}


@dataclasses.dataclass(frozen=True)
class Pair:
  """A query and the document that answers it.

  Attributes:
    domain, task: its attributes.
    query, document: texts.
    others: hard negatives, the remaining part of the entry.
  """

  domain: str
  task: str
  query: str
  document: str
  others: tuple[str, ...]


def of(entries: Iterable[Entry], task: str) -> tuple[Pair, ...]:
  """One pair of each entry.

  Raises:
    ValueError: for an unknown task.

  Example:
    >>> entry = Entry("wordnet", "noun/1", "duress", "compulsory force", "under duress", "train")
    >>> of([entry], "name")[0].query, of([entry], "name")[0].document
    ('compulsory force', 'duress')
  """
  asks, answers = parts(task)

  def pair(entry: Entry) -> Pair:
    query, document = getattr(entry, asks), getattr(entry, answers)
    others = tuple(text for text in entry.texts if text not in (query, document))
    return Pair(entry.domain, task, query, document, others)

  return tuple(map(pair, entries))


def parts(task: str) -> tuple[str, str]:
  """The part of an entry that asks, and the one that answers.

  Raises:
    ValueError: for an unknown task.
  """
  if task not in TASKS:
    raise ValueError(f"task {task!r}; allowed: {', '.join(TASKS)}")
  return TASKS[task]


def pool(entries: Iterable[Entry]) -> tuple[str, ...]:
  """All texts of the entries, each once.

  Example:
    >>> pool([Entry("wordnet", "noun/1", "duress", "compulsory force", "under duress", "train")])
    ('duress', 'compulsory force', 'under duress')
  """
  return tuple(dict.fromkeys(text for entry in entries for text in entry.texts))


def diagonal(
  domains: Sequence[str], tasks: Sequence[str], shift: Size = 0
) -> frozenset[tuple[str, str]]:
  """Combinations to hold out, (domain i, task i + shift): one of each domain, and of no task all.

  As many shifts as there are tasks hold each combination out once.

  Raises:
    ValueError: for fewer than two domains or tasks, which could not be told apart, or a shift that
      is no integer.

  Example:
    >>> sorted(diagonal(["a", "b"], ["define", "name"], shift=1))
    [('a', 'name'), ('b', 'define')]
  """
  if min(len(domains), len(tasks)) < 2:
    raise ValueError(f"domains={domains}, tasks={tasks}; allowed: two or more of each")
  shift = number("shift", shift, integer=True)
  return frozenset((name, tasks[(i + shift) % len(tasks)]) for i, name in enumerate(domains))
