import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.data.corpus import SPLITS, VALIDATION, Corpus, Document, combine, split_of


def test_splits_partition_the_corpus_and_share_no_text(corpus):
  train, validation = (corpus.select(split=split) for split in SPLITS)
  assert {d.id for d in train} | {d.id for d in validation} == {d.id for d in corpus}
  assert not {d.text for d in train} & {d.text for d in validation}
  assert len(train) + len(validation) == len(corpus)


def test_a_text_found_in_both_splits_is_kept_once():
  ids = [Document("a", str(number), "x") for number in range(200)]
  train = next(d for d in ids if split_of(d) == "train")
  held_out = next(d for d in ids if split_of(d) == "validation")
  corpus = Corpus("same", (train, held_out))
  assert [d.id for d in corpus] == [train.id]


def test_share_of_validation_is_near_the_constant():
  count = sum(split_of(Document("d", str(n), "x")) == "validation" for n in range(20_000))
  assert abs(count / 20_000 - VALIDATION) < 0.005


def test_split_is_the_same_on_every_machine():
  documents = [Document("d", str(number), "x") for number in range(100)]
  held_out = [d.title for d in documents if split_of(d) == "validation"]
  assert held_out == ["9", "24", "29", "58", "67", "70", "87", "92"]


def test_translations_of_a_document_are_in_one_split():
  for number in range(100):
    languages = ("book", "book/de-DE", "book/fr-FR")
    assert len({split_of(Document(name, str(number), "x")) for name in languages}) == 1


def test_membership_does_not_depend_on_other_documents_or_on_the_limit(corpus):
  whole = {d.id: split_of(d) for d in corpus}
  small = corpus.limited(corpus.nbytes // 3)
  assert all(split_of(d) == whole[d.id] for d in small)


@given(share=st.floats(0.05, 0.99))
@settings(max_examples=20, deadline=None)
def test_a_limited_corpus_keeps_order_and_shares(corpus, share):
  small = corpus.limited(int(corpus.nbytes * share))
  assert small.nbytes <= corpus.nbytes * share
  order = [d.id for d in corpus]
  assert [order.index(d.id) for d in small] == sorted(order.index(d.id) for d in small)
  for domain in corpus.domains:
    kept = small.select(domain=domain).nbytes / corpus.select(domain=domain).nbytes
    assert abs(kept - share) < 0.1


def test_a_cut_document_is_a_prefix_and_never_half_a_character():
  corpus = Corpus("wide", (Document("a", "1", "日本語" * 100),))
  (document,) = corpus.limited(100)
  assert len(document.text.encode()) == 99
  assert corpus.documents[0].text.startswith(document.text)


def test_fingerprint_sees_text_order_and_boundaries():
  texts = [("ab", "c"), ("a", "bc"), ("c", "ab"), ("ab", "d"), ("abd/1c",)]
  prints = {
    Corpus("x", tuple(Document("d", str(n), t) for n, t in enumerate(pair))).fingerprint
    for pair in texts
  }
  assert len(prints) == len(texts)


def test_combine_keeps_order(corpus):
  other = Corpus("o", (Document("third", "1", "new text"),))
  assert [d.id for d in combine("all", [other, corpus])][:2] == ["third/1", "left/0"]


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda c: Corpus("none", ()), "'none' is empty"),
    (lambda c: Corpus("blank", (Document("a", "1", " \n"),)), "'blank' is empty"),
    (lambda c: c.select(split="test"), "split 'test' is unknown; allowed: train, validation"),
    (lambda c: c.select(domain="up"), "domain 'up' is not in corpus.*left, right"),
    (lambda c: c.limited(0), "limit_bytes is 0"),
  ],
)
def test_errors_name_what_was_wrong(corpus, call, message):
  with pytest.raises(ValueError, match=message):
    call(corpus)
