"""Tokenised text as one flat array, kept on disk and mapped into memory."""

import dataclasses
import hashlib
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer

from effjax.data.cache import cache_dir, write_whole
from effjax.data.corpus import Corpus
from effjax.data.tokenizers import Tokenizer

FORMAT_VERSION = 1
SMALL_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class TokenStream:
  """The tokens of N documents one after another, each followed by the end token.

  Invariants: `lengths` (end tokens included) add up to the Z tokens; ids are below `vocab_size`.
  """

  tokens: Integer[np.ndarray, "Z"]
  lengths: Int[np.ndarray, "N"]


def _encode(corpus: Corpus, tokenizer: Tokenizer) -> TokenStream:
  if tokenizer.eos_id is None:
    raise ValueError("the tokenizer has no eos_id; packing needs a token that ends documents")
  dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
  documents = []
  for document in corpus:
    encoded = list(tokenizer.encode(document.text))
    if encoded[-1:] != [tokenizer.eos_id]:
      encoded.append(tokenizer.eos_id)
    ids = np.array(encoded, np.int64)
    wrong = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
    if wrong.size:
      raise ValueError(
        f"the tokenizer gave id {wrong[0]} in document {document.id!r}; its vocab_size is "
        f"{tokenizer.vocab_size}"
      )
    documents.append(ids.astype(dtype))
  return TokenStream(np.concatenate(documents), np.array([len(ids) for ids in documents]))


def _read(tokens: Path, lengths: Path) -> TokenStream:
  stream = TokenStream(np.load(tokens, mmap_mode="r"), np.load(lengths))
  if stream.lengths.sum() != len(stream.tokens):
    raise ValueError(f"token files {tokens} and {lengths} do not belong together; delete both")
  return stream


def _keep(stream: TokenStream, tokens: Path, lengths: Path) -> TokenStream:
  try:
    write_whole(lengths, lambda file: np.save(file, stream.lengths))
    write_whole(tokens, lambda file: np.save(file, stream.tokens))
  except OSError as error:
    warnings.warn(
      f"tokens stay in memory: {tokens.parent} cannot be written ({error})", stacklevel=3
    )
    return stream
  return _read(tokens, lengths)


def tokenize(corpus: Corpus, tokenizer: Tokenizer) -> TokenStream:
  """Encodes every document of a corpus once and ends it with the end token.

  A tokenizer that ends what it encodes itself (BERT's [SEP]) is not given a second end.
  A corpus of a megabyte or more is kept in `cache_dir()/tokens` under a key made of its text and
  `tokenizer.fingerprint`, and is mapped from there the next time; a tokenizer without a
  fingerprint, and a cache that cannot be written (with a warning), leave the tokens in memory.
  Raises ValueError where an id is not below `vocab_size` or the tokenizer has no `eos_id`.

  >>> from effjax.data.corpus import Document
  >>> from effjax.data.tokenizers import ByteTokenizer
  >>> corpus = Corpus("demo", (Document("a", "1", "hi"), Document("a", "2", "you")))
  >>> stream = tokenize(corpus, ByteTokenizer())
  >>> stream.lengths, stream.tokens[:3]
  (array([3, 4]), array([104, 105, 258], dtype=uint16))
  """
  identity = getattr(tokenizer, "fingerprint", None)
  if identity is None or corpus.nbytes < SMALL_BYTES:
    return _encode(corpus, tokenizer)
  content = f"{FORMAT_VERSION} {corpus.fingerprint} {identity} {tokenizer.eos_id}"
  key = hashlib.sha256(content.encode()).hexdigest()[:32]
  tokens = cache_dir() / "tokens" / f"{key}.npy"
  lengths = tokens.with_name(f"{key}-lengths.npy")
  if tokens.exists() and lengths.exists():
    return _read(tokens, lengths)
  return _keep(_encode(corpus, tokenizer), tokens, lengths)
