"""Tokenizers for small models: bytes, characters, words, and byte-pair encoding.

All share the protocol `Tokenizer`, which the tokenizers of pretrained models share too.
`fingerprint` is optional in it: with one, tokenised text is kept on disk and found again.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import operator
import re
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Protocol, SupportsIndex, runtime_checkable

import tokenizers as hf_tokenizers

from effjax.data.cache import write_whole

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
_WORD = re.compile(r" ?\w+| ?[^\w\s]+|\s")


@runtime_checkable
class Tokenizer(Protocol):
  """What the data pipeline asks of a tokenizer.

  `encode` adds no end token; `decode` leaves special tokens out. An id is None where there is no
  such token; packing needs those that end and that pad.
  """

  @property
  def vocab_size(self) -> int: ...

  @property
  def bos_id(self) -> int | None: ...

  @property
  def eos_id(self) -> int | None: ...

  @property
  def pad_id(self) -> int | None: ...

  def encode(self, text: str) -> list[int]: ...

  def decode(self, ids: Iterable[SupportsIndex]) -> str: ...


def _check_ids(ids: Iterable[SupportsIndex], vocab_size: int) -> list[int]:
  numbers = [operator.index(token) for token in ids]
  for token in numbers:
    if not 0 <= token < vocab_size:
      raise ValueError(f"token id {token} is out of range; allowed: 0 to {vocab_size - 1}")
  return numbers


def _fingerprint(*parts: str) -> str:
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """UTF-8 bytes as ids 0 to 255, then pad, bos and eos: 259 ids; decodes every text exactly.

  >>> tokenizer = ByteTokenizer()
  >>> tokenizer.encode("né"), tokenizer.decode([110, 195, 169, 258])
  ([110, 195, 169], 'né')
  """

  kind: ClassVar[str] = "byte"
  vocab_size: int = dataclasses.field(default=259, init=False)
  pad_id: int = dataclasses.field(default=256, init=False)
  bos_id: int = dataclasses.field(default=257, init=False)
  eos_id: int = dataclasses.field(default=258, init=False)
  fingerprint: str = dataclasses.field(default="byte-259", init=False)

  def encode(self, text: str) -> list[int]:
    return list(text.encode())

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    known = (token for token in _check_ids(ids, self.vocab_size) if token < 256)
    return bytes(known).decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class VocabularyTokenizer:
  """Ids by a list of pieces: special tokens 0 to 3, then `pieces` in order.

  `kind` "char" cuts a text into characters, "word" into words and runs of punctuation with the
  blank before them. A piece that is not in the list becomes the unknown token.

  >>> tokenizer = train_char(["abc"])
  >>> tokenizer.encode("cab?"), tokenizer.decode([6, 4, 5, 3, 2])
  ([6, 4, 5, 3], 'cab<unk>')
  """

  kind: str
  pieces: tuple[str, ...]
  pad_id: int = dataclasses.field(default=0, init=False)
  bos_id: int = dataclasses.field(default=1, init=False)
  eos_id: int = dataclasses.field(default=2, init=False)
  unk_id: int = dataclasses.field(default=3, init=False)

  @property
  def vocab_size(self) -> int:
    return len(SPECIAL) + len(self.pieces)

  @functools.cached_property
  def fingerprint(self) -> str:
    return _fingerprint(self.kind, *self.pieces)

  @functools.cached_property
  def _ids(self) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(self.pieces, start=len(SPECIAL))}

  def encode(self, text: str) -> list[int]:
    pieces = text if self.kind == "char" else _WORD.findall(text)
    return [self._ids.get(piece, self.unk_id) for piece in pieces]

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    shown = {self.pad_id: "", self.bos_id: "", self.eos_id: "", self.unk_id: SPECIAL[3]}
    ids = _check_ids(ids, self.vocab_size)
    return "".join(shown[i] if i in shown else self.pieces[i - len(SPECIAL)] for i in ids)


@dataclasses.dataclass(frozen=True)
class BPETokenizer:
  """Byte-level byte-pair encoding by the `tokenizers` library; decodes every text exactly.

  >>> tokenizer = train_bpe(["the cat and the dog and the bird"] * 4, 280)
  >>> tokenizer.decode(tokenizer.encode("the dög"))
  'the dög'
  """

  kind: ClassVar[str] = "bpe"
  json: str
  pad_id: int = dataclasses.field(default=0, init=False)
  bos_id: int = dataclasses.field(default=1, init=False)
  eos_id: int = dataclasses.field(default=2, init=False)

  @functools.cached_property
  def _model(self) -> hf_tokenizers.Tokenizer:
    model = hf_tokenizers.Tokenizer.from_str(self.json)
    model.encode_special_tokens = True  # "<eos>" in a text is five characters, not the end token
    return model

  @functools.cached_property
  def vocab_size(self) -> int:
    return self._model.get_vocab_size()

  @functools.cached_property
  def fingerprint(self) -> str:
    return _fingerprint(self.kind, self.json)

  def encode(self, text: str) -> list[int]:
    return self._model.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    return self._model.decode(_check_ids(ids, self.vocab_size))


def _most_common(counts: collections.Counter, size: int | None) -> tuple[str, ...]:
  ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
  return tuple(ranked if size is None else ranked[: size - len(SPECIAL)])


def _check_size(size: int | None, least: int) -> None:
  if size is not None and size < least:
    raise ValueError(f"size is {size}; the vocabulary must have at least {least} tokens")


def train_char(texts: Iterable[str], size: int | None = None) -> VocabularyTokenizer:
  """Characters of the texts in code order; with `size`, only as many of the most common ones.

  Raises ValueError where `size` leaves no room beside the four special tokens.

  >>> train_char(["hello"]).pieces
  ('e', 'h', 'l', 'o')
  """
  _check_size(size, len(SPECIAL) + 1)
  counts: collections.Counter[str] = collections.Counter()
  for text in texts:
    counts.update(text)
  return VocabularyTokenizer("char", tuple(sorted(_most_common(counts, size))))


def train_word(texts: Iterable[str], size: int) -> VocabularyTokenizer:
  """The most common words (with the blank before them), ties in code order.

  Raises ValueError where `size` leaves no room beside the four special tokens.

  >>> train_word(["a rose is a rose"], 7).pieces
  (' rose', ' a', ' is')
  """
  _check_size(size, len(SPECIAL) + 1)
  counts: collections.Counter[str] = collections.Counter()
  for text in texts:
    counts.update(_WORD.findall(text))
  return VocabularyTokenizer("word", _most_common(counts, size))


def train_bpe(texts: Iterable[str], size: int) -> BPETokenizer:
  """Byte-level BPE with at most `size` ids, four of them special (Sennrich et al., 2016).

  Raises ValueError where `size` is below 260: the special tokens and the 256 bytes.

  >>> train_bpe(["low lower lowest"] * 5, 264).vocab_size
  264
  """
  _check_size(size, len(SPECIAL) + 256)
  model = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE())
  model.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = hf_tokenizers.decoders.ByteLevel()
  trainer = hf_tokenizers.trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=list(SPECIAL),
    initial_alphabet=sorted(hf_tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  model.train_from_iterator(texts, trainer)
  return BPETokenizer(model.to_str())


KINDS = ("byte", "char", "word", "bpe")
Trained = ByteTokenizer | VocabularyTokenizer | BPETokenizer


def build(kind: str, texts: Iterable[str], size: int | None = None) -> Trained:
  """A tokenizer by kind, trained on texts where it needs training.

  `size` is the number of ids; "word" and "bpe" need it, "byte" has its own.
  Raises ValueError for an unknown kind or an unfit size.

  >>> build("byte", []).vocab_size
  259
  """
  match kind:
    case "byte":
      return ByteTokenizer()
    case "char":
      return train_char(texts, size)
    case "word" | "bpe":
      if size is None:
        raise ValueError(f"a tokenizer of kind {kind!r} needs a size")
      return train_word(texts, size) if kind == "word" else train_bpe(texts, size)
  raise ValueError(f"tokenizer kind {kind!r} is unknown; allowed: {', '.join(KINDS)}")


def save(tokenizer: Trained, path: str | Path) -> None:
  """Writes one of this file's tokenizers as JSON; `load` reads it back equal."""
  fields = {field.name: getattr(tokenizer, field.name) for field in dataclasses.fields(tokenizer)}
  content = {"kind": tokenizer.kind, "pieces": fields.get("pieces"), "json": fields.get("json")}
  write_whole(Path(path), lambda file: file.write(json.dumps(content).encode()))


def load(path: str | Path) -> Trained:
  """Reads a tokenizer that `save` wrote.

  Raises ValueError where the file holds none.
  """
  try:
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    kind = content["kind"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} holds no tokenizer written by save") from error
  match kind:
    case "byte":
      return ByteTokenizer()
    case "char" | "word":
      return VocabularyTokenizer(kind, tuple(content["pieces"]))
    case "bpe":
      return BPETokenizer(content["json"])
  raise ValueError(f"{path}: tokenizer kind {kind!r} is unknown; allowed: {', '.join(KINDS)}")
