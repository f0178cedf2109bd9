import dataclasses

import numpy as np
import pytest

from effjax.data import stream
from effjax.data.corpus import Corpus, Document
from effjax.data.tokenizers import ByteTokenizer


@pytest.fixture
def large(monkeypatch):
  monkeypatch.setattr(stream, "SMALL_BYTES", 10)
  return Corpus("c", tuple(Document("a", str(n), f"text {n}") for n in range(20)))


class Counting:
  """A byte tokenizer that counts its calls."""

  vocab_size, bos_id, eos_id, pad_id = 259, 257, 258, 256

  def __init__(self, fingerprint=None):
    self.calls = 0
    if fingerprint:
      self.fingerprint = fingerprint

  def encode(self, text):
    self.calls += 1
    return list(text.encode())

  def decode(self, ids):
    return ByteTokenizer().decode(ids)


def test_documents_come_back_with_an_end_token_each(large):
  result = stream.tokenize(large, ByteTokenizer())
  pieces = np.split(result.tokens, np.cumsum(result.lengths)[:-1])
  assert [ByteTokenizer().decode(piece[:-1]) for piece in pieces] == [d.text for d in large]
  assert all(piece[-1] == ByteTokenizer().eos_id for piece in pieces)


def test_text_is_tokenised_once_and_mapped_from_disk_after(large):
  first, second = Counting("x"), Counting("x")
  a, b = stream.tokenize(large, first), stream.tokenize(large, second)
  assert (first.calls, second.calls) == (20, 0)
  assert isinstance(b.tokens, np.memmap)
  np.testing.assert_array_equal(a.tokens, b.tokens)
  np.testing.assert_array_equal(a.lengths, b.lengths)


def test_other_text_and_other_tokenizers_are_not_confused(large):
  stream.tokenize(large, Counting("x"))
  changed = Corpus("c", (dataclasses.replace(large.documents[0], text="other"), *large.documents))
  for corpus, identity in ((large, "y"), (changed, "x")):
    tokenizer = Counting(identity)
    stream.tokenize(corpus, tokenizer)
    assert tokenizer.calls == len(corpus)


def test_without_a_fingerprint_nothing_is_kept(large, cache):
  stream.tokenize(large, Counting())
  assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_a_warning_and_the_tokens_are_right(large, cache):
  cache.write_text("a file where the folder should be")
  with pytest.warns(UserWarning, match="tokens stay in memory"):
    result = stream.tokenize(large, ByteTokenizer())
  assert len(result.tokens) == result.lengths.sum()


def test_files_that_do_not_belong_together_are_refused(large, cache):
  stream.tokenize(large, ByteTokenizer())
  (lengths,) = cache.glob("tokens/*-lengths.npy")
  np.save(lengths, np.array([1, 2]))
  with pytest.raises(ValueError, match="do not belong together; delete both"):
    stream.tokenize(large, ByteTokenizer())


def test_ids_outside_the_vocabulary_are_refused(large):
  tokenizer = Counting()
  tokenizer.vocab_size = 100
  with pytest.raises(ValueError, match="id 116 in document 'a/0'; its vocab_size is 100"):
    stream.tokenize(large, tokenizer)


def test_a_tokenizer_that_ends_texts_itself_gets_no_second_end(large):
  tokenizer = Counting()
  tokenizer.encode = lambda text: [*text.encode(), 258]
  result = stream.tokenize(large, tokenizer)
  assert (result.tokens == 258).sum() == len(large)


def test_a_tokenizer_without_an_end_token_is_refused(large):
  tokenizer = Counting()
  tokenizer.eos_id = None
  with pytest.raises(ValueError, match="no eos_id"):
    stream.tokenize(large, tokenizer)
