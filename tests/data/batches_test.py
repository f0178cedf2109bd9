import collections
import dataclasses
import json

import chex
import numpy as np
import pytest

from effjax.data.batches import domain_rows, epoch, loader
from effjax.data.corpus import SPLITS, Corpus, Document
from effjax.data.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
both = pytest.mark.parametrize("packing", ["contiguous", "best_fit"])


def load(corpus, **overrides):
  options = {"batch_size": 4, "length": 32, "seed": 3} | overrides
  return loader(corpus, BYTES, **options)


def take(batches, count):
  return [next(batches) for _ in range(count)]


def documents_in(batches):
  """The documents (domain, number) that begin in some batches, read back from their tokens."""
  found = collections.Counter()
  for batch in batches:
    for row, segments, positions in zip(
      batch["tokens"], batch["segment_ids"], batch["positions"], strict=True
    ):
      for start in np.flatnonzero((segments >= 0) & (positions == 0)):
        words = BYTES.decode(row[start:]).split()
        if words and words[0] in ("left", "right") and len(words) > 1:
          found[words[0]] += 1
  return found


@both
def test_resuming_gives_exactly_the_batches_that_followed(corpus, packing):
  batches = load(corpus, packing=packing)
  take(batches, 7)
  state = json.loads(json.dumps(batches.get_state()))
  expected = take(batches, 150)  # over several epochs
  fresh = load(corpus, packing=packing)
  fresh.set_state(state)
  for ours, theirs in zip(take(fresh, 150), expected, strict=True):
    chex.assert_trees_all_equal(ours, theirs)


def test_resuming_at_the_start_and_going_back(corpus):
  batches = load(corpus)
  start = batches.get_state()
  expected = take(batches, 3)
  batches.set_state(start)
  chex.assert_trees_all_equal(take(batches, 3), expected)


def test_shards_together_are_the_batch_of_one_process(corpus):
  whole = load(corpus, batch_size=8)
  parts = [load(corpus, batch_size=8, shard=(index, 4)) for index in range(4)]
  for _ in range(20):
    pieces = [next(part) for part in parts]
    joined = {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}
    chex.assert_trees_all_equal(joined, next(whole))


def test_a_run_may_resume_on_another_number_of_processes(corpus):
  whole = load(corpus, batch_size=8)
  take(whole, 5)
  half = load(corpus, batch_size=8, shard=(1, 2))
  half.set_state(whole.get_state())
  np.testing.assert_array_equal(next(half)["tokens"], next(whole)["tokens"][4:])


def test_seeds_decide_the_order_and_epochs_differ(corpus):
  one = corpus.select(domain="left")
  rows = sum(len(part) for part in domain_rows(one, BYTES, length=32).values())
  batches = load(one, batch_size=1)
  first, second = take(batches, rows), take(batches, rows)
  as_set = lambda batches: sorted(batch["tokens"].tobytes() for batch in batches)
  assert as_set(first) == as_set(second)
  order = lambda batches: [batch["tokens"].tobytes() for batch in batches]
  assert order(first) != order(second)
  assert order(first) == order(take(load(one, batch_size=1), rows))
  assert order(first) != order(take(load(one, batch_size=1, seed=4), rows))


@pytest.mark.parametrize("weights", [{"left": 3, "right": 1}, {"left": 0.123, "right": 0.877}])
def test_domains_come_in_the_proportions_asked_for(corpus, weights):
  batches = load(corpus, weights=weights, batch_size=10, packing="best_fit", length=256)
  rows = domain_rows(corpus, BYTES, length=256, packing="best_fit")
  owner = {}
  for domain in rows:
    for batch in epoch(
      corpus.select(domain=domain), BYTES, batch_size=1, length=256, split="train",
      packing="best_fit",
    ):  # fmt: skip
      owner[batch["tokens"].tobytes()] = domain
  seen = collections.Counter(
    owner[row.tobytes()] for batch in take(batches, 50) for row in batch["tokens"]
  )
  share = weights["left"] / sum(weights.values())
  assert abs(seen["left"] - 500 * share) <= 5
  assert batches.proportions["left"] == pytest.approx(share)


def test_without_weights_domains_come_by_their_size(corpus):
  batches = load(corpus)
  expected = batches.rows["left"] / sum(batches.rows.values())
  assert batches.proportions["left"] == pytest.approx(expected)


def test_a_domain_that_is_not_named_or_weighs_nothing_is_left_out(corpus):
  for weights in ({"left": 1.0}, {"left": 1.0, "right": 0.0}):
    batches = load(corpus, weights=weights)
    assert set(batches.proportions) == {"left"}
    assert documents_in(take(batches, 30))["right"] == 0


@both
def test_validation_and_training_share_no_document(corpus, packing):
  kept = {}
  for split in SPLITS:
    batches = epoch(corpus, BYTES, batch_size=3, length=512, split=split, packing=packing)
    kept[split] = {
      BYTES.decode(row[segments == segment])
      for batch in batches
      for row, segments in zip(batch["tokens"], batch["segment_ids"], strict=True)
      for segment in range(segments.max() + 1)
    }
  for split in SPLITS:
    texts = {d.text for d in corpus.select(split=split)}
    assert packing == "contiguous" or kept[split] == texts
  assert not kept["train"] & kept["validation"]


@both
def test_epoch_counts_every_target_once(corpus, packing):
  batches = list(epoch(corpus, BYTES, batch_size=7, length=32, split="train", packing=packing))
  train = corpus.select(split="train")
  assert sum(batch["weights"].sum() for batch in batches) == train.nbytes  # eos for first byte
  counted = np.concatenate([b["targets"][b["weights"] > 0] for b in batches])
  everything = np.concatenate([[*d.text.encode()[1:], BYTES.eos_id] for d in train])
  np.testing.assert_array_equal(np.bincount(counted), np.bincount(everything))
  chex.assert_shape([batch["tokens"] for batch in batches], (7, 32))


@both
def test_training_epoch_loses_nothing(corpus, packing):
  batches = load(corpus, batch_size=1, packing=packing, weights={"right": 1})
  counted = np.concatenate(
    [b["targets"][b["weights"] > 0] for b in take(batches, batches.rows["right"])]
  )
  train = corpus.select(split="train", domain="right")
  everything = np.concatenate([[*d.text.encode()[1:], BYTES.eos_id] for d in train])
  np.testing.assert_array_equal(np.bincount(counted), np.bincount(everything))


def test_padding_uses_the_pad_token(corpus):
  *_, last = epoch(corpus, BYTES, batch_size=8, length=500)
  assert (last["tokens"][last["segment_ids"] < 0] == BYTES.pad_id).all()
  assert (last["segment_ids"] < 0).any()


@pytest.mark.parametrize(
  "overrides",
  [
    {"seed": 4},
    {"length": 33},
    {"batch_size": 8},
    {"packing": "best_fit"},
    {"weights": {"left": 1}},
  ],
)
def test_a_state_of_other_data_is_refused(corpus, overrides):
  state = load(corpus).get_state()
  with pytest.raises(ValueError, match="belongs to other data"):
    load(corpus, **overrides).set_state(state)
  with pytest.raises(ValueError, match="belongs to other data"):
    load(corpus).set_state({"next_index": 3})


def test_a_state_of_other_text_is_refused(corpus):
  first, *others = corpus.select(split="train")
  changed = Corpus("two", (dataclasses.replace(first, text="another text"), *others))
  with pytest.raises(ValueError, match="belongs to other data"):
    load(changed).set_state(load(corpus).get_state())


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"weights": {"up": 1.0}}, "weights names domain 'up'; .* left, right"),
    ({"weights": {"left": -1.0}}, r"weights\['left'\] is -1.0"),
    ({"weights": {"left": float("nan")}}, r"weights\['left'\] is nan"),
    ({"weights": {"left": float("inf")}}, r"weights\['left'\] is inf"),
    ({"weights": {"left": 0.0, "right": 0.0}}, "at least one must be positive"),
    ({"weights": {}}, "at least one must be positive"),
    ({"length": 1}, "length is 1"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"batch_size": 5, "shard": (0, 2)}, "multiple of the 2 shards"),
    ({"shard": (2, 2)}, "0 ≤ index < count"),
    ({"split": "test"}, "split 'test' is unknown"),
    ({"packing": "tight"}, "packing 'tight' is unknown"),
    ({"length": 100_000}, "fewer than one row of length 100000"),
  ],
)
def test_errors_name_what_was_wrong(corpus, overrides, message):
  with pytest.raises(ValueError, match=message):
    load(corpus, **overrides)


def test_a_split_without_documents_says_so():
  corpus = Corpus("one", (Document("a", "train me", "text " * 100),))
  with pytest.raises(ValueError, match="no document in split 'validation'"):
    epoch(corpus, BYTES, batch_size=1, length=8)


def test_a_source_can_be_given_by_name():
  with pytest.raises(ValueError, match="text source 'nowhere' is unknown"):
    load("nowhere")


def test_the_place_of_a_loader_does_not_depend_on_the_type_of_its_numbers(corpus):
  ours, theirs = {"batch_size": 2, "seed": 3, "length": 32}, {}
  for name, value in ours.items():
    theirs[name] = np.int64(value)
  weights = {"left": np.float32(0.5), "right": 0.5}
  place = load(corpus, weights={"left": 0.5, "right": 0.5}, **ours).get_state()
  other = load(corpus, weights=weights, **theirs)
  assert other.get_state() == place
  other.set_state(place)
