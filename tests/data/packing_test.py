import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.data import packing as packings

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)
CASES = {"lengths": LENGTHS, "length": st.integers(2, 17)}
both = pytest.mark.parametrize("packing", ["contiguous", "best_fit"])


def packed(lengths, length, packing):
  """All rows of a stream in which token i is the number i + 1, and the plan."""
  lengths = np.array(lengths)
  stream = np.arange(1, lengths.sum() + 1)
  plan = packings.pack(lengths, length, packing)
  rows = packings.empty_rows(len(plan), length)
  for index in range(len(plan)):
    packings.fill({name: value[index] for name, value in rows.items()}, stream, plan, index)
  return rows, plan


def document_of(lengths):
  """Document number of each token, indexed by the token's number less one."""
  return np.repeat(np.arange(len(lengths)), lengths)


@both
@given(**CASES)
@settings(max_examples=60, deadline=None)
def test_every_token_is_a_target_once_unless_first_of_its_document(lengths, length, packing):
  rows, plan = packed(lengths, length, packing)
  targets = np.sort(rows["targets"][rows["weights"] > 0])
  firsts = 1 + np.cumsum(lengths) - np.array(lengths)
  expected = np.setdiff1d(np.arange(1, sum(lengths) + 1), firsts)
  np.testing.assert_array_equal(targets, expected)
  assert plan.targets == len(targets)


@both
@given(**CASES)
@settings(max_examples=60, deadline=None)
def test_targets_follow_tokens_in_the_same_document(lengths, length, packing):
  rows, _ = packed(lengths, length, packing)
  counted = rows["weights"] > 0
  tokens, targets = rows["tokens"][counted], rows["targets"][counted]
  np.testing.assert_array_equal(targets, tokens + 1)
  document = document_of(lengths)
  np.testing.assert_array_equal(document[tokens - 1], document[targets - 1])


@both
@given(**CASES)
@settings(max_examples=60, deadline=None)
def test_segments_hold_one_document_in_order_with_positions_from_zero(lengths, length, packing):
  rows, _ = packed(lengths, length, packing)
  document = document_of(lengths)
  for tokens, segments, positions in zip(
    rows["tokens"], rows["segment_ids"], rows["positions"], strict=True
  ):
    present = segments[segments >= 0]
    np.testing.assert_array_equal(np.unique(present), np.arange(present.max() + 1))
    assert (np.diff(present) >= 0).all()
    for segment in range(present.max() + 1):
      inside = tokens[segments == segment]
      assert len(set(document[inside - 1])) == 1
      np.testing.assert_array_equal(inside, inside[0] + np.arange(len(inside)))
      np.testing.assert_array_equal(positions[segments == segment], np.arange(len(inside)))


@both
@given(**CASES)
@settings(max_examples=30, deadline=None)
def test_padding_comes_last_and_counts_nothing(lengths, length, packing):
  rows, _ = packed(lengths, length, packing)
  padding = rows["segment_ids"] == packings.PADDING_SEGMENT
  assert (np.diff(padding.astype(int), axis=1) >= 0).all()
  assert rows["weights"][padding].sum() == 0
  assert (rows["tokens"][padding] == 0).all() and (rows["targets"][padding] == 0).all()


@given(**CASES)
@settings(max_examples=30, deadline=None)
def test_contiguous_rows_are_slices_of_the_stream(lengths, length):
  rows, plan = packed(lengths, length, "contiguous")
  total = sum(lengths)
  assert len(plan) == -(-total // length)
  np.testing.assert_array_equal(rows["tokens"].ravel()[:total], np.arange(1, total + 1))


@given(**CASES)
@settings(max_examples=60, deadline=None)
def test_best_fit_cuts_only_documents_longer_than_a_row(lengths, length):
  rows, plan = packed(lengths, length, "best_fit")
  document = document_of(lengths)
  pieces = np.bincount(document[plan.starts], minlength=len(lengths))
  np.testing.assert_array_equal(pieces, np.maximum(-(-(np.array(lengths) - 1) // length), 1))
  used = (rows["segment_ids"] >= 0).sum(axis=1)
  assert len(plan) == 1 or np.sort(used)[:2].sum() > length  # no two rows could be one


def test_best_fit_fills_rows_of_a_known_case():
  plan = packings.best_fit(np.array([6, 5, 4, 3, 2]), 10)
  rows = [sorted(plan.sizes[a:b].tolist()) for a, b in zip(plan.rows, plan.rows[1:], strict=False)]
  assert sorted(rows) == [[2, 3, 5], [4, 6]]


def test_best_fit_wastes_little_on_text_like_lengths():
  lengths = np.random.default_rng(0).lognormal(5, 1, 3000).astype(int) + 2
  plan = packings.best_fit(lengths, 512)
  assert plan.sizes.sum() / (len(plan) * 512) > 0.99


def test_attention_and_loss_stay_inside_documents():
  """The mask the segment ids describe lets no position see or predict another document."""
  lengths = [5, 9, 3, 20, 2]
  rows, _ = packed(lengths, 8, "best_fit")
  segments = rows["segment_ids"]
  same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] >= 0)
  document = document_of(lengths)
  owner = np.where(segments >= 0, document[rows["tokens"] - 1], -1)
  crossing = owner[:, :, None] != owner[:, None, :]
  assert not (same & crossing).any()
  ends = np.isin(rows["tokens"], np.cumsum(lengths))
  assert (rows["weights"][ends] == 0).all()


def test_batch_has_the_types_the_training_step_expects():
  rows = packings.empty_rows(2, 3, pad_id=7)
  chex.assert_shape(list(rows.values()), (2, 3))
  assert {name: value.dtype.name for name, value in rows.items()} == {
    "tokens": "int32", "targets": "int32", "weights": "float32",
    "segment_ids": "int32", "positions": "int32",
  }  # fmt: skip
  assert (rows["tokens"] == 7).all()


@pytest.mark.parametrize(
  "lengths, length, packing, message",
  [
    ([3, 4], 1, "contiguous", "length is 1"),
    ([3, 4], 0, "best_fit", "length is 0"),
    ([3, 0], 8, "contiguous", "one positive number of tokens a document"),
    ([], 8, "best_fit", "not empty"),
    ([3], 8, "first_fit", "packing 'first_fit' is unknown; allowed: contiguous, best_fit"),
  ],
)
def test_errors_name_what_was_wrong(lengths, length, packing, message):
  with pytest.raises(ValueError, match=message):
    packings.pack(np.array(lengths, np.int64), length, packing)
