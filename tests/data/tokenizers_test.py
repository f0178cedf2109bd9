import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.data import tokenizers
from effjax.data.sources import text

SAMPLE = ["the cat sat on the mat.\n", "the dog, the dög; 3 dogs\n"] * 5
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
TRAINED = {kind: tokenizers.build(kind, SAMPLE, 300) for kind in tokenizers.KINDS}
every = pytest.mark.parametrize("kind", tokenizers.KINDS)


@every
def test_known_text_comes_back_and_ids_are_in_range(kind):
  tokenizer = TRAINED[kind]
  for sample in SAMPLE:
    ids = tokenizer.encode(sample)
    assert tokenizer.decode(ids) == sample
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@given(sample=ANY_TEXT)
@settings(max_examples=100, deadline=None)
def test_byte_level_tokenizers_decode_every_text_exactly(kind, sample):
  tokenizer = TRAINED[kind]
  assert tokenizer.decode(tokenizer.encode(sample)) == sample


@given(sample=ANY_TEXT)
@settings(max_examples=50, deadline=None)
def test_words_lose_nothing_but_unknown_words(sample):
  tokenizer = tokenizers.train_word([sample], 1000)
  assert tokenizer.decode(tokenizer.encode(sample)) == sample


@every
def test_names_of_special_tokens_in_a_text_are_just_text(kind):
  tokenizer = TRAINED[kind]
  ids = tokenizer.encode("<eos><pad><bos>")
  assert not {tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id} & set(ids)


@every
def test_special_ids_differ_are_in_range_and_print_nothing(kind):
  tokenizer = TRAINED[kind]
  special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}
  assert len(special) == 3 and max(special) < tokenizer.vocab_size
  ids = [tokenizer.bos_id, *tokenizer.encode("the"), tokenizer.eos_id, tokenizer.pad_id]
  assert tokenizer.decode(np.array(ids, np.int32)) == "the"


def test_unknown_pieces_become_the_unknown_token():
  assert TRAINED["char"].encode("a§") == [TRAINED["char"].encode("a")[0], 3]
  assert TRAINED["word"].decode(TRAINED["word"].encode("the zebra")) == "the<unk>"


def test_a_small_vocabulary_keeps_the_most_common():
  assert tokenizers.train_char(["aaabbc"], 6).pieces == ("a", "b")
  assert tokenizers.train_word(["a b b c c"], 6).pieces == (" b", " c")


def test_bpe_compresses_and_trains_to_the_same_tokenizer_each_time():
  texts = [d.text for d in text("pydoc", limit_bytes=100_000)]
  first, second = (tokenizers.train_bpe(texts, 600) for _ in range(2))
  assert first == second and first.vocab_size == 600
  assert len(first.encode(texts[0])) < 0.6 * len(texts[0].encode())


@every
def test_saved_tokenizers_come_back_equal(kind, tmp_path):
  tokenizer = TRAINED[kind]
  tokenizers.save(tokenizer, tmp_path / "tokenizer.json")
  loaded = tokenizers.load(tmp_path / "tokenizer.json")
  assert loaded == tokenizer and loaded.fingerprint == tokenizer.fingerprint


@every
def test_all_follow_the_protocol_and_differ_by_fingerprint(kind):
  assert isinstance(TRAINED[kind], tokenizers.Tokenizer)
  others = [other.fingerprint for name, other in TRAINED.items() if name != kind]
  assert TRAINED[kind].fingerprint not in others


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: tokenizers.build("sentence", []), "kind 'sentence' is unknown; allowed: byte, char"),
    (lambda: tokenizers.build("bpe", []), "'bpe' needs a size"),
    (lambda: tokenizers.train_bpe(SAMPLE, 200), "size is 200.*at least 260"),
    (lambda: tokenizers.train_word(SAMPLE, 4), "size is 4"),
    (lambda: TRAINED["byte"].decode([259]), "token id 259 is out of range; allowed: 0 to 258"),
    (lambda: TRAINED["char"].decode([-1]), "token id -1 is out of range"),
    (lambda: TRAINED["bpe"].decode([10**6]), "token id 1000000 is out of range"),
  ],
)
def test_errors_name_what_was_wrong(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize("content", ["not json", "[]", "{}", json.dumps({"kind": "other"})])
def test_a_file_without_a_tokenizer_is_refused(tmp_path, content):
  path = tmp_path / "t.json"
  path.write_text(content)
  with pytest.raises(ValueError, match=r"t\.json"):
    tokenizers.load(path)
