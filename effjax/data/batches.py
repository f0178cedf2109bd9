"""Batches of packed rows: endless, shuffled and mixed for training; once through for evaluation.

The order of rows is a function of the seed alone: each domain is shuffled anew every epoch, and
domains are interleaved by weight. A batch is `batch_size` rows of that order, and process i of n
takes the i-th n-th of its rows, so the batches of a run do not depend on how many processes
read them. Where an iterator stands is one number, which goes into checkpoints.
"""

import dataclasses
import hashlib
import math
import sys
from collections.abc import Iterator, Mapping

import grain

from effjax.core.known import number
from effjax.core.typing import Number, Size
from effjax.data import packing as packings
from effjax.data.corpus import Corpus, check_split, split_of
from effjax.data.packing import Batch, Plan
from effjax.data.sources import text
from effjax.data.stream import TokenStream, tokenize
from effjax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Rows:
  """The packed rows of one domain, in the order of its documents."""

  stream: TokenStream
  plan: Plan
  fingerprint: str

  def __len__(self) -> int:
    return len(self.plan)


def _assemble(rows: list[tuple[Rows, int]], count: int, length: int, pad_id: int) -> Batch:
  """`count` rows, the given ones first, padding after."""
  batch = packings.empty_rows(count, length, pad_id)
  for place, (domain, index) in enumerate(rows):
    row = {name: value[place] for name, value in batch.items()}
    packings.fill(row, domain.stream.tokens, domain.plan, index)
  return batch


def domain_rows(
  corpus: Corpus | str,
  tokenizer: Tokenizer,
  *,
  length: Size,
  split: str = "train",
  packing: str = "contiguous",
) -> dict[str, Rows]:
  """Tokenises and packs one split of a corpus, domain by domain.

  Domains without a document in the split are left out.
  Raises ValueError for an unknown split or packing, a length below 2, a split without documents,
  and a split with fewer tokens than one row.

  >>> from effjax.data.tokenizers import ByteTokenizer
  >>> rows = domain_rows("pydoc", ByteTokenizer(), length=64)
  >>> list(rows), len(rows["pydoc"]) > 5000
  (['pydoc'], True)
  """
  check_split(split)
  corpus = text(corpus) if isinstance(corpus, str) else corpus
  present = sorted({document.domain for document in corpus if split_of(document) == split})
  if not present:
    raise ValueError(
      f"corpus {corpus.name!r} has no document in split {split!r} "
      f"({len(corpus)} documents in all); give more documents"
    )
  rows = {}
  for domain in present:
    part = corpus.select(split=split, domain=domain)
    stream = tokenize(part, tokenizer)
    plan = packings.pack(stream.lengths, length, packing)
    rows[domain] = Rows(stream, plan, part.fingerprint)
  tokens = sum(len(row.stream.tokens) for row in rows.values())
  if tokens < length:
    raise ValueError(
      f"corpus {corpus.name!r} has {tokens} tokens in split {split!r}, fewer than one row of "
      f"length {length}; give more text or a shorter length"
    )
  return rows


def _proportions(
  rows: Mapping[str, Rows], weights: Mapping[str, Number] | None
) -> dict[str, float]:
  """Weights of the domains that take part, adding up to one."""
  if weights is None:
    weights = {domain: len(value) for domain, value in rows.items()}
  for domain, weight in weights.items():
    if domain not in rows:
      raise ValueError(
        f"weights names domain {domain!r}; domains with text in this split: {', '.join(rows)}"
      )
    if isinstance(weight, bool) or not math.isfinite(weight) or weight < 0:
      raise ValueError(f"weights[{domain!r}] is {weight}; it must be finite and not negative")
  weights = {domain: float(weight) for domain, weight in weights.items()}
  total = sum(weights.values())
  if total <= 0:
    raise ValueError(f"weights are {dict(weights)}; at least one must be positive")
  return {domain: weights[domain] / total for domain in rows if weights.get(domain, 0) > 0}


def _interleave(rows: Mapping[str, Rows], proportions: Mapping[str, float], seed: int):
  """An endless sequence of (domain, row index)."""

  def shuffled(number: int, domain: str):
    order = grain.MapDataset.range(len(rows[domain])).shuffle(seed=(seed + number) % 2**32)
    return order.map(lambda index: (domain, index)).repeat()

  parts = [shuffled(number, domain) for number, domain in enumerate(proportions)]
  return grain.MapDataset.mix(parts, list(proportions.values()))


class Loader:
  """An endless iterator over training batches whose place can be saved and restored.

  `proportions` are the shares of the domains, `rows` how many rows each has: one epoch.
  """

  def __init__(
    self,
    rows: Mapping[str, Rows],
    *,
    proportions: Mapping[str, float],
    batch_size: int,
    seed: int,
    shard: tuple[int, int],
    pad_id: int,
    identity: str,
  ):
    self.proportions = dict(proportions)
    self.rows = {domain: len(rows[domain]) for domain in proportions}
    index, count = shard
    local = batch_size // count
    order = _interleave(rows, proportions, seed)
    length = next(iter(rows.values())).plan.length

    def batch(step: int) -> Batch:
      first = step * batch_size + index * local
      chosen = [order[place] for place in range(first, first + local)]
      return _assemble([(rows[domain], row) for domain, row in chosen], local, length, pad_id)

    steps = grain.MapDataset.range(sys.maxsize // batch_size).map(batch)
    inline = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    self._batches = iter(steps.to_iter_dataset(inline))
    parts = [identity, batch_size, length, seed, sorted(proportions.items())]
    parts += [(domain, rows[domain].fingerprint) for domain in sorted(proportions)]
    self._identity = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    return next(self._batches)

  def get_state(self) -> dict[str, int | str]:
    """Where the iterator stands: JSON-ready, the same on every process."""
    return {**self._batches.get_state(), "data": self._identity}

  def set_state(self, state: Mapping[str, int | str]) -> None:
    """Goes to a saved place; the batches that follow are those that followed then.

    Raises ValueError where the state was saved with other text, tokenizer, seed, weights, length,
    packing or batch size. The number of processes may differ.
    """
    state = dict(state)
    saved = state.pop("data", None)
    if saved != self._identity:
      raise ValueError(
        "the saved loader state belongs to other data: text, tokenizer, split, packing, length, "
        f"batch_size, seed or weights differ (saved {saved}, here {self._identity})"
      )
    self._batches.set_state(state)


def _check_batch(batch_size: Size, shard: tuple[Size, Size]) -> int:
  index, count = (number("shard", each, integer=True) for each in shard)
  batch_size = number("batch_size", batch_size, integer=True)
  if batch_size < 1:
    raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
  if not 0 <= index < count:
    raise ValueError(f"shard is {shard}; it must be (index, count) with 0 ≤ index < count")
  if batch_size % count:
    raise ValueError(f"batch_size is {batch_size}; it must be a multiple of the {count} shards")
  return batch_size


def _padding(tokenizer: Tokenizer) -> int:
  if tokenizer.pad_id is None:
    raise ValueError("the tokenizer has no pad_id; packing needs a token that fills rows")
  return tokenizer.pad_id


def loader(
  corpus: Corpus | str,
  tokenizer: Tokenizer,
  *,
  batch_size: Size,
  length: Size,
  seed: Size,
  split: str = "train",
  packing: str = "contiguous",
  weights: Mapping[str, Number] | None = None,
  shard: tuple[Size, Size] = (0, 1),
) -> Loader:
  """An endless iterator over batches of packed, shuffled, mixed rows.

  A batch is a dict of arrays [B, T] (B = batch_size / shards, T = length): tokens, targets,
  segment_ids (-1 is padding) and positions in int32, weights in float32 (0 where no target counts).

  Args:
    corpus: a corpus, or the name of a text source.
    tokenizer: anything with the protocol `Tokenizer`.
    batch_size: rows of a batch over all shards together.
    length: positions of a row.
    seed: decides the order.
    split: "train" or "validation".
    packing: "contiguous" or "best_fit", see effjax.data.packing.
    weights: share of the rows for each domain, of any sum; domains not named are left out. None
      takes each in proportion to its text.
    shard: index of this process and their number.

  Raises ValueError for a batch size that the shards do not divide, a weight that is negative,
  infinite, NaN or of an unknown domain, weights that are all zero, and as `domain_rows` does.

  >>> from effjax.data.tokenizers import ByteTokenizer
  >>> corpus = text("pydoc", limit_bytes=50_000)
  >>> batches = loader(corpus, ByteTokenizer(), batch_size=2, length=64, seed=0)
  >>> place = batches.get_state()
  >>> first = next(batches)
  >>> first["tokens"].shape
  (2, 64)
  >>> batches.set_state(place)
  >>> bool((next(batches)["tokens"] == first["tokens"]).all())
  True
  """
  batch_size = _check_batch(batch_size, shard)
  seed = number("seed", seed, integer=True)
  rows = domain_rows(corpus, tokenizer, length=length, split=split, packing=packing)
  vocabulary = getattr(
    tokenizer, "fingerprint", f"{type(tokenizer).__name__} {tokenizer.vocab_size}"
  )
  return Loader(
    rows,
    proportions=_proportions(rows, weights),
    batch_size=batch_size,
    seed=seed,
    shard=shard,
    pad_id=_padding(tokenizer),
    identity=f"{vocabulary} {packing}",
  )


def epoch(
  corpus: Corpus | str,
  tokenizer: Tokenizer,
  *,
  batch_size: Size,
  length: Size,
  split: str = "validation",
  packing: str = "contiguous",
) -> Iterator[Batch]:
  """Every row of a split once, in order; the last batch is filled up with padding rows.

  Batches are those of `loader`. Raises ValueError as `domain_rows` does and for a batch size
  below 1.

  >>> from effjax.data.tokenizers import ByteTokenizer
  >>> corpus = text("pydoc", limit_bytes=50_000)
  >>> batches = list(epoch(corpus, ByteTokenizer(), batch_size=4, length=128))
  >>> rows = domain_rows(corpus, ByteTokenizer(), length=128, split="validation")
  >>> counted = sum(int(batch["weights"].sum()) for batch in batches)
  >>> counted == sum(row.plan.targets for row in rows.values())
  True
  """
  batch_size = _check_batch(batch_size, (0, 1))
  rows = domain_rows(corpus, tokenizer, length=length, split=split, packing=packing)
  pad_id = _padding(tokenizer)
  order = [(part, index) for part in rows.values() for index in range(len(part))]
  return (
    _assemble(order[first : first + batch_size], batch_size, length, pad_id)
    for first in range(0, len(order), batch_size)
  )
