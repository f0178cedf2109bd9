"""Bytes behind scored tokens, and what is paid for them."""

import math

import jax
import numpy as np
import pytest

from effjax.data import ByteTokenizer, Corpus, Document, split_of
from effjax.data.tokenizers import train_bpe
from experiments.lab.held_out import HeldOut, held_out, nats
from experiments.lab.sizes import Rung
from experiments.lab.subject import fresh, token_nll

RUNG = Rung("tiny", 16, 1, 2, batch=2, learning_rate=1e-2, vocab=300, length=16)


def corpus() -> Corpus:
  texts = [f"straße {i} führt über {i * i} brücken" for i in range(300)]
  return Corpus("roads", [Document("roads", str(i), text) for i, text in enumerate(texts)])


def test_bytes_are_those_of_the_text_but_for_what_is_not_scored():
  text = corpus()
  found = held_out(text, ByteTokenizer(), rows=4, length=64, batch_size=2)
  ends = sum(int((b["targets"] == 258)[b["weights"] > 0].sum()) for b in found.batches)
  assert found.tokens == sum(int(b["weights"].sum()) for b in found.batches)
  assert found.nbytes == pytest.approx(found.tokens - ends, abs=8)  # letters cut at a row's end


def test_another_vocabulary_scores_as_many_bytes():
  text = corpus()
  documents = [d for d in text if split_of(d) == "validation"]
  tokenizer = train_bpe([d.text for d in text], 300)
  first = sum(len(tokenizer.decode(tokenizer.encode(d.text)[:1]).encode()) for d in documents)
  whole = sum(len(d.text.encode()) for d in documents)
  tokens = sum(len(tokenizer.encode(d.text)) + 1 for d in documents)
  rows = -(-tokens // 16)
  found = held_out(text, tokenizer, rows=rows, length=16, batch_size=1)
  assert found.nbytes == pytest.approx(whole - first, rel=0.02)


def test_paid_by_hand():
  batch = {"weights": np.array([[1.0, 0.0, 1.0]])}
  paid = HeldOut([batch, batch], nbytes=16).paid(8 * math.log(2))
  assert paid == pytest.approx({"nll": 2 * math.log(2), "bits_byte": 0.5})


def test_each_seed_pays_for_itself():
  subject = fresh(RUNG.config(), (0, 1))
  tokens = np.random.default_rng(0).integers(0, 300, (2, 2, 16))
  batch = {"tokens": tokens[0], "targets": tokens[1], "weights": np.ones((2, 16))}
  batch["weights"][0, :4] = 0
  paid = nats(subject, HeldOut([batch, batch], 1))
  for index in (0, 1):
    one = subject.at(index)
    values = jax.device_get(token_nll(one.module, one.params, batch))
    assert paid[index] == pytest.approx(2 * (values * batch["weights"]).sum(), rel=1e-5)
