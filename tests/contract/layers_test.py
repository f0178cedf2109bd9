"""Every layer and every model, through the same tests."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from effjax.core import trees
from effjax.models import Transformer
from effjax.parallel import make_mesh
from effjax.train import Checkpoints
from tests.contract.layers import PADDED, ROWS, TOKENS, B, D, T, V
from tests.modules import normal

POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))


def rows(trait: str | None = None, *, slow_models: bool = False):
  """Runs a test for the rows that promise `trait`, and notes so on it."""
  chosen = [row for row in ROWS if trait is None or getattr(row, trait)]
  marks = lambda row: [pytest.mark.slow] if slow_models and row.inputs is TOKENS else []
  cases = [pytest.param(row, id=row.name, marks=marks(row)) for row in chosen]

  def mark(test):
    test.promise = trait
    return pytest.mark.parametrize("row", cases)(test)

  return mark


def assert_close(got, expected, tolerance=1e-4):
  expected = np.asarray(expected, np.float32)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=0, atol=tolerance * scale)


def vary(inputs, at):
  """`inputs` with other values where `at` [B, T] is True."""
  inputs = np.asarray(inputs)
  other = (inputs + 1) % V if inputs.ndim == 2 else inputs + np.float32(1)
  return np.where(at if inputs.ndim == 2 else at[..., None], other, inputs)


@rows(slow_models=True)
def test_jit_equals_eager(row):
  assert row.output.dtype == jnp.float32
  assert_close(row.apply(row.params, row.inputs, None, jnp.float32), row.output)


@rows(slow_models=True)
def test_vmap_equals_a_larger_batch(row):
  halves = np.asarray(row.inputs).reshape(2, B // 2, *row.inputs.shape[1:])
  apply = jax.vmap(lambda params, x: row.apply(params, x, None, jnp.float32), (None, 0))
  found = np.asarray(jax.jit(apply)(row.params, halves))
  assert_close(found.reshape(row.output.shape), row.output)


@rows()
def test_gradients_are_finite_and_not_all_zero(row):
  floats, rest = trees.partition(row.params, lambda path, x: jnp.issubdtype(x.dtype, jnp.floating))

  @jax.jit
  def grad(floats):
    y = lambda floats: row.apply(trees.merge(floats, rest), row.inputs, PADDED, jnp.float32)
    return jax.grad(lambda floats: jnp.square(y(floats)).sum())(floats)

  grads = grad(floats)
  chex.assert_tree_all_finite(grads)
  chex.assert_trees_all_equal_structs(grads, floats)
  assert any(np.asarray(g).any() for g in jax.tree.leaves(grads))


@rows()
def test_bfloat16_is_close_to_float32(row):
  half = row.compiled(row.params, row.inputs, None, jnp.bfloat16)
  assert half.dtype == jnp.bfloat16
  error = np.abs(np.asarray(half, np.float32) - np.asarray(row.output))
  # The median: rounding may move a token to another expert.
  assert np.median(error) < 0.02 * np.abs(np.asarray(row.output)).max()
  assert np.isfinite(error).all()


@rows("causal")
def test_causality(row):
  if row.inputs.ndim == 2:
    later = vary(row.inputs, np.broadcast_to(np.arange(T) > 3, (B, T)))
    changed = np.asarray(row.compiled(row.params, later, None, jnp.float32))
    before = np.asarray(row.output)
    assert_close(changed[:, :4], before[:, :4], 1e-6)
    assert np.abs(changed[:, 4:] - before[:, 4:]).max() > 0
    return
  at_3 = lambda x, params: row.apply(params, x, None, jnp.float32)[:, 3].sum()
  seen = np.abs(np.asarray(jax.jit(jax.grad(at_3))(row.inputs, row.params))).sum((0, 2))
  assert (seen[4:] == 0).all()
  assert seen[3] > 0
  assert (seen[:3].max() == 0) == row.pointwise


@rows("padding")
def test_padding_does_not_matter(row):
  real = np.asarray(PADDED) >= 0
  compiled = lambda inputs: row.compiled(row.params, inputs, PADDED, jnp.float32)
  if row.packed:
    compiled = lambda inputs: row.placed(row.params, inputs, PADDED, POSITIONS)
  y, other = compiled(row.inputs), compiled(vary(row.inputs, ~real))
  assert_close(np.asarray(other)[real], np.asarray(y)[real], 1e-6)
  assert np.isfinite(y).all()
  if row.causal:
    assert_close(np.asarray(y)[real], np.asarray(row.output)[real])


# Padding at the start, at the end, between, everywhere, and beside and within two documents.
IDS = np.zeros((B, T), np.int32)
IDS[1, :2] = IDS[2, 4:] = IDS[3, 2:4] = IDS[4] = IDS[6] = -1
IDS[6, 1:3], IDS[6, 4:] = 5, 2


@rows("padding")
def test_what_is_masked_has_no_influence(row):
  floats, rest = trees.partition(row.params, lambda path, x: jnp.issubdtype(x.dtype, jnp.floating))

  @jax.jit
  def run(floats, inputs, positions, dy):
    def apply(floats, inputs):
      (y, _), sown = row.sown(trees.merge(floats, rest), inputs, jnp.asarray(IDS), positions)
      losses = sum(map(jnp.sum, jax.tree.leaves(sown.get("losses", {}))), jnp.zeros(()))
      return (y, losses), sown

    (y, _), pull, sown = jax.vjp(apply, floats, inputs, has_aux=True)
    grads, dx = pull((dy, jnp.ones(())))
    return y, sown, grads, jnp.zeros_like(y) if inputs.ndim == 2 else dx

  token = IDS >= 0
  over = lambda x: token if x.ndim == 2 else token[..., None]
  masked = lambda x, fill: np.where(over(x), x, x.dtype.type(fill))
  inputs, dy = np.asarray(row.inputs), np.asarray(normal(*row.output.shape, seed=4))
  logits = isinstance(row.module, Transformer) and row.module.config.head

  def found(fill, index):
    spoilt = masked(inputs, index if inputs.ndim == 2 else fill)
    come_back = masked(dy, 1e30 if fill and logits else fill)
    return run(floats, spoilt, masked(POSITIONS, index), come_back)

  clean = y, _, grads, dx = found(0.0, 0)
  chex.assert_tree_all_finite(clean)
  assert not np.asarray(y)[~token].any() and not np.asarray(dx)[~token].any()
  assert any(np.asarray(g).any() for g in jax.tree.leaves(grads))
  for fill, index in ((np.nan, -1), (np.inf, V), (-np.inf, -(2**31)), (1e30, 2**31 - 1)):
    chex.assert_trees_all_equal(found(fill, index), clean)


@rows("packed")
def test_packed_sequences_are_as_they_are_alone(row):
  ids = np.broadcast_to(np.repeat(np.int32([3, 1]), T // 2), (B, T))
  positions = POSITIONS % (T // 2)
  inputs = np.asarray(row.inputs)
  packed = np.asarray(row.placed(row.params, inputs, ids, positions))
  for part in (slice(0, T // 2), slice(T // 2, T)):  # of one length: one program
    alone = row.placed(row.params, inputs[:, part], ids[:, part], positions[:, part])
    assert_close(packed[:, part], alone, 1e-5)


@rows("packed")
def test_what_is_in_a_packed_sequence_does_not_reach_another(row):
  if row.inputs.ndim == 2:
    return
  ids, positions = np.int32([[3] * 3 + [1] * 3] * B), POSITIONS % (T // 2)

  @jax.jit
  def run(inputs, dy):
    y, pull = jax.vjp(
      lambda x: row.run(row.params, x, jnp.asarray(ids), jnp.asarray(positions))[0], inputs
    )
    return y, pull(dy)[0]

  inputs, dy = np.asarray(row.inputs), np.asarray(normal(B, T, D, seed=4))
  for own in (1, 3):
    keep = lambda x, fill, own=own: np.where((ids == own)[..., None], x, np.float32(fill))
    clean = run(inputs, keep(dy, 0))
    for fill in (np.nan, np.inf, 1e30):
      for got, wanted in zip(run(keep(inputs, fill), keep(dy, 0)), clean, strict=True):
        assert_close(keep(got, 0), keep(wanted, 0), 1e-6)


@rows("decodes")
def test_decoding_token_by_token_is_the_whole_forward(row):
  present = np.ones((B, T), bool)
  present[1::3, 4:] = False
  if not row.absolute:
    present[2::3, :3] = False
  ids, positions = np.where(present, 0, -1), np.maximum(present.cumsum(1) - 1, 0)
  given = (row.inputs, ids.astype(np.int32), positions.astype(np.int32))
  first = 2  # as many tokens at once, the others one by one

  @jax.jit
  def decode(params, *given):
    y, cache = row.run(params, *(x[:, :first] for x in given), row.empty_cache(B, T))

    def step(cache, part):
      y, cache = row.run(params, *(x[:, None] for x in part), cache)
      return cache, y[:, 0]

    later = tuple(jnp.moveaxis(x[:, first:], 1, 0) for x in given)
    _, rest = jax.lax.scan(step, cache, later)
    return jnp.concatenate([y, jnp.moveaxis(rest, 0, 1)], axis=1)

  stepped, whole = np.asarray(decode(row.params, *given)), row.placed(row.params, *given)
  assert np.isfinite(stepped).all()
  assert_close(stepped[present], np.asarray(whole)[present], 1e-5)


@rows("reduces")
def test_it_reduces_to_the_baseline(row):
  both, argument = row.reduces()
  got, expected = jax.jit(both)(argument)
  assert_close(got, expected, 2e-5)


@rows()
def test_it_works_on_a_mesh(row):
  mesh = make_mesh(data=8)

  def place(x):
    divisible = [i for i, n in enumerate(x.shape) if n % 8 == 0]
    spec = [None] * x.ndim
    if divisible:
      spec[divisible[0]] = "data"
    return jax.device_put(np.asarray(x), NamedSharding(mesh, PartitionSpec(*spec)))

  params, inputs = jax.tree.map(place, (row.params, row.inputs))
  y = row.compiled(params, inputs, None, jnp.float32)
  assert len(y.sharding.device_set) == 8
  assert_close(y, row.output)


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
  params = {row.name: row.params for row in ROWS}
  with Checkpoints(tmp_path_factory.mktemp("contract")) as checkpoints:
    checkpoints.save(1, params)
    return checkpoints.restore(jax.eval_shape(lambda: params)).state


@rows()
def test_parameters_survive_a_checkpoint(row, restored):
  chex.assert_trees_all_equal(restored[row.name], row.params)
  chex.assert_trees_all_equal_structs(restored[row.name], row.params)
