"""Weights, ids and numbers, through the same tests wherever they are taken."""

import inspect

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from effjax.core.known import check_ids, number
from tests.contract.coverage_test import ROOMS, public
from tests.contract.numbers import IDS, LOSSES, NUMBERS, READERS, WEIGHTS, B, T, V
from tests.modules import normal

each = lambda rows: pytest.mark.parametrize("row", rows, ids=lambda row: row.name)
LOGITS = normal(B, T, V)
UNREAD = WEIGHTS == 0
POISON = {"NaN": (np.nan, -100), "inf": (np.inf, V), "-inf": (-np.inf, 2**31 - 1)}


def graded(row):
  """The value and its gradient by the logits, as one program."""
  compute = jax.jit(jax.value_and_grad(row.loss))
  given = lambda weights: np.asarray(weights) != 0 if row.masks else weights
  return lambda logits, ids, weights: compute(logits, ids, given(weights))


@each(LOSSES)
def test_what_has_no_weight_is_not_read(row):
  compute = graded(row)
  value, grad = compute(LOGITS, IDS, WEIGHTS)
  assert np.isfinite(value) and np.asarray(grad)[~UNREAD].any()
  assert not np.asarray(grad)[UNREAD].any()
  for x, target in POISON.values():
    logits = np.where(UNREAD[..., None], np.float32(x), LOGITS)
    found = compute(logits, np.where(UNREAD, np.int32(target), IDS), WEIGHTS)
    chex.assert_trees_all_equal(found, (value, grad))


@each(LOSSES)
def test_a_mean_is_one_for_weights_of_any_size_and_type(row):
  compute = graded(row)
  value, _ = compute(LOGITS, IDS, WEIGHTS)
  for scale in (1e-30, 1e30):
    found, grad = compute(LOGITS, IDS, WEIGHTS * np.float32(scale))
    np.testing.assert_allclose(found, value, rtol=1e-6)
    chex.assert_tree_all_finite(grad)
  whole = compute(LOGITS, IDS, WEIGHTS.astype(np.int32))[0]
  np.testing.assert_allclose(whole, value, rtol=1e-6)
  none, grad = compute(LOGITS, IDS, np.zeros_like(WEIGHTS))
  assert float(none) == 0 and not np.asarray(grad).any()
  counted = compute(LOGITS, IDS, ~UNREAD)[0], compute(LOGITS, IDS, np.float32(~UNREAD))[0]
  assert float(counted[0]) == float(counted[1])


@each(LOSSES)
def test_weights_are_one_for_each_position(row):
  for shape in ((B, 1), (1, T), (B, T, 1), (T,), ()):
    with pytest.raises(ValueError, match=r"weights|mask"):
      row.loss(LOGITS, jnp.asarray(IDS), jnp.ones(shape, bool if row.masks else jnp.float32))


@each([row for row in LOSSES if not row.masks])
def test_a_weight_that_is_none_is_refused_or_seen(row):
  for wrong in (-1.0, np.nan, np.inf):
    weights = np.where(np.arange(B * T).reshape(B, T) == 3, np.float32(wrong), WEIGHTS)
    with pytest.raises(ValueError, match="weights: one is"):
      row.loss(LOGITS, jnp.asarray(IDS), jnp.asarray(weights))
    assert np.isnan(graded(row)(LOGITS, IDS, weights)[0])


@each([row for row in LOSSES if row.ids and row.name != "of each token"])
def test_a_target_that_is_no_token_is_refused_or_seen(row):
  for wrong in (-1, -100, V, 2**31 - 1):
    targets = np.where(np.arange(B * T).reshape(B, T) == 2, np.int32(wrong), IDS)
    with pytest.raises(ValueError, match=f"targets: id {wrong} at .0, 2."):
      row.loss(LOGITS, jnp.asarray(targets), jnp.asarray(WEIGHTS))
    assert np.isnan(graded(row)(LOGITS, targets, WEIGHTS)[0])


@each(READERS)
def test_an_id_that_is_none_is_refused_or_seen(row):
  wrong = np.array([-1, -100, row.count, 2**31 - 1, -(2**31)], np.int32)
  ids = np.stack([IDS[0], wrong])
  read = jax.jit(row.read)
  found, right = np.asarray(read(ids)), np.asarray(read(IDS))
  np.testing.assert_array_equal(found[0], right[0])
  assert np.isnan(found[1]).all() and np.isfinite(right).all()
  softmax = jax.jit(lambda ids: jax.nn.softmax(row.read(ids)))(ids)  # a compiler may lose a NaN
  assert np.isnan(softmax[1]).all() or found.shape[-1] == 1
  for each in wrong:
    with pytest.raises(ValueError, match=f"id {each} at .1, 0.; allowed: 0 to {row.count - 1}"):
      row.read(jnp.asarray(np.where(np.arange(T)[None] == 0, [[0], [each]], IDS)))
  chex.assert_trees_all_close(row.read(jnp.asarray(IDS)), right, rtol=1e-5)


@pytest.fixture
def unannotated():
  """Calls are not checked against their annotations, as they are not outside of tests."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unannotated")
@each(NUMBERS)
def test_a_number_is_the_same_of_any_type_and_none_out_of_bounds(row):
  whole = isinstance(row.good, int)
  expected = row.call(row.good)
  for kind in (np.int32, np.int64) if whole else (np.float32, np.float64):
    chex.assert_trees_all_close(row.call(kind(row.good)), expected, rtol=1e-6)
  of_numpy = [np.asarray(wrong)[()] for wrong in row.bad]
  for wrong in (*row.bad, *of_numpy, float("nan"), np.float32("nan"), float("inf"), True, "1"):
    with pytest.raises(ValueError, match=r"allowed|must|needs|divide"):
      row.call(wrong)


@pytest.mark.parametrize(
  "wrong", [None, "1", True, np.bool_(1), 1j, float("nan"), np.float32("inf"), jnp.ones(1), [1], 0]
)
def test_what_is_no_number_is_named(wrong):
  with pytest.raises(ValueError, match=r"T: x=.*; allowed: above 0, below 3"):
    number("x", wrong, of="T", above=0, below=3)


@pytest.mark.parametrize("right", [1, 1.5, np.float16(1.5), np.int8(2), jnp.bfloat16(1), 2**1000])
def test_what_is_known_becomes_a_number_of_python(right):
  found = number("x", right, above=0)
  assert type(found) in (int, float) and found == right


def test_what_is_traced_stays_as_it_is():
  assert jax.jit(lambda x: number("x", x, least=0, most=1))(-5.0) == -5
  with pytest.raises(ValueError, match=r"x float32\[\]; allowed: from 1, an integer"):
    jax.jit(lambda x: number("x", x, integer=True, least=1))(2.0)


@pytest.mark.usefixtures("unannotated")
def test_ids_are_integers():
  with pytest.raises(ValueError, match=r"ids: float32\[2\]; allowed: integers"):
    check_ids("ids", np.ones(2, np.float32), 3)


def test_every_loss_has_a_row():
  exported = [value for room in (*ROOMS, "train") for value in public(room).values()]
  losses = {value for value in exported if inspect.isfunction(value)
            and value.__name__.endswith(("_loss", "_objective"))}  # fmt: skip
  assert losses <= {row.of for row in LOSSES}
