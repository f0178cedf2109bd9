"""A grid of domains and tasks of retrieval as numbers: tokens, batches, vectors, exact ranks."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from effjax.data import Corpus, Document, entries, pairs
from effjax.data.tokenizers import Tokenizer
from effjax.peft import ranking

Cell = tuple[str, str]  # a domain and a task
Batch = dict[str, np.ndarray]
NOTHING = -1  # the attribute of a row that chooses no module


class Grid:
  """The texts of every combination of a domain and a task, by their places in one list.

  Attributes:
    domains, tasks, cells: names; a cell is a domain and a task.
    texts: all of them, each once.
    tokens, segment_ids: of the texts, [texts, length].
    pool: places of the documents that held-out queries choose among, those of all domains.

  Args:
    sizes: "train" and "validation" → entries of each domain.
    length: tokens of a text.
  """

  def __init__(
    self,
    domains: Sequence[str],
    tasks: Sequence[str],
    tokenizer: Tokenizer,
    *,
    sizes: Mapping[str, int],
    length: int,
  ):
    self.domains, self.tasks = tuple(domains), tuple(tasks)
    self.cells: list[Cell] = list(itertools.product(self.domains, self.tasks))
    every = entries.read(*domains)
    chosen = {
      split: [entries.choose(every, domain=d, split=split, limit=n) for d in self.domains]
      for split, n in sizes.items()
    }
    self.texts = pairs.pool(e for split in chosen.values() for found in split for e in found)
    place = {text: number for number, text in enumerate(self.texts)}
    self.tokens, self.segment_ids = padded(tokenizer, self.texts, length)
    held_out = [entry for found in chosen["validation"] for entry in found]
    self.pool = np.array([place[text] for text in pairs.pool(held_out)])
    self._rows = {
      (split, domain, task): _places(pairs.of(found, task), place)
      for split, found_in in chosen.items()
      for domain, found in zip(self.domains, found_in, strict=True)
      for task in self.tasks
    }

  @property
  def corpus(self) -> Corpus:
    """All texts, as documents."""
    texts = enumerate(self.texts)
    return Corpus("+".join(self.domains), [Document("entries", str(i), text) for i, text in texts])

  def attributes(self, cell: Cell) -> np.ndarray:
    """The ids of a cell's modules, the domain's and the task's, [2]."""
    domain, task = cell
    return np.array([self.domains.index(domain), len(self.domains) + self.tasks.index(task)])

  def rows(self, split: str, cell: Cell) -> np.ndarray:
    """Places of query, document and the entry's other part of each pair, [pairs, 3]."""
    return self._rows[(split, *cell)]

  def read(self, places: np.ndarray) -> Batch:
    """The tokens of some texts."""
    return {"tokens": self.tokens[places], "segment_ids": self.segment_ids[places]}

  def batches(
    self,
    cells: Sequence[Cell],
    size: int,
    rng: np.random.Generator,
    *,
    vectors: np.ndarray | None,
    hard: bool,
    modular: bool = True,
  ) -> Iterator[Batch]:
    """Batches for `retrieval.in_batch`, each from one domain and all of its tasks in `cells`.

    Args:
      vectors: of all texts, or None where documents come as tokens.
      hard: whether the other part of an entry is a candidate too.
      modular: whether the encoder reads attributes.
    """
    domains = sorted({domain for domain, _ in cells})
    while True:
      domain = domains[rng.integers(len(domains))]
      own = [cell for cell in cells if cell[0] == domain]
      drawn = [own[i] for i in rng.integers(len(own), size=size)]
      found = [self.rows("train", cell) for cell in drawn]
      rows = np.stack([x[rng.integers(len(x))] for x in found])
      queries, documents = rows[:, 0], rows[:, 1 : 2 + hard]
      batch = self.read(queries) | {"keys": queries, "document_keys": documents}
      if modular:
        batch["attributes"] = np.stack([self.attributes(cell) for cell in drawn])
      if vectors is not None:
        batch["documents"] = vectors[documents]
      else:
        batch |= {f"document_{name}": x for name, x in self.read(documents).items()}
        batch["document_attributes"] = np.full((*documents.shape, 2), NOTHING)
      yield batch

  def found(self, queries: np.ndarray, documents: np.ndarray, cell: Cell) -> dict[str, float]:
    """How well a cell's held-out queries find their documents in the pool.

    Args:
      queries: vectors of the cell's queries.
      documents: vectors of the pool.

    Returns:
      "mrr", the mean reciprocal rank, "recall@1", "recall@10"; "mrr of other", that of the other
      part of the entry; and as "prefers" the share of queries that put their document before it.
    """
    rows = self.rows("validation", cell)
    where = {place: number for number, place in enumerate(self.pool)}
    relevant, other = (np.array([where[x] for x in column]) for column in rows[:, 1:].T)
    ranks, ranks_of_other = (
      ranking.ranks(queries, documents, right, hidden=ranking.hidden(self.pool, right, rows[:, 0]))
      for right in (relevant, other)
    )
    return {
      "mrr": ranking.mean_reciprocal_rank(ranks),
      "recall@1": ranking.recall(ranks, 1),
      "recall@10": ranking.recall(ranks, 10),
      "mrr of other": ranking.mean_reciprocal_rank(ranks_of_other),
      "prefers": float((ranks < ranks_of_other).mean()),
    }


def padded(
  tokenizer: Tokenizer, texts: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens of each text and segment ids, −1 behind its end; [texts, length].

  A text that is too long keeps its last token, which may be one that marks the end.
  """
  rows = [tokenizer.encode(text) for text in texts]
  rows = [row if len(row) <= length else [*row[: length - 1], row[-1]] for row in rows]
  tokens = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
  ends = np.array([len(row) for row in rows])[:, None]
  return tokens, np.where(np.arange(length)[None] < ends, 0, -1).astype(np.int32)


def _places(found: Sequence[pairs.Pair], place: dict[str, int]) -> np.ndarray:
  texts = [(pair.query, pair.document, pair.others[0]) for pair in found]
  return np.array([[place[text] for text in row] for row in texts], np.int32)


def word(cell: Cell) -> str:
  """A cell's name."""
  return "/".join(cell)
