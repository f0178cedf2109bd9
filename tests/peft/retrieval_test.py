"""The dual encoder's objective beside numpy in float64; padding, copies, own texts; exact ranks."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from effjax.peft import ranking
from effjax.peft.retrieval import Encoder, in_batch, in_batch_loss
from effjax.train import init_state, make_train_step
from tests.modules import normal

V, D = 9, 4
TABLE = {"embedding": normal(V, D)}
EMBED = nn.Embed(V, D)
QUERIES, DOCUMENTS = np.asarray(normal(3, D, seed=1)), np.asarray(normal(6, D, seed=2))


def nats(products, relevant):
  """−log softmax in float64."""
  products = np.asarray(products, np.float64)
  return scipy.special.logsumexp(products, axis=1) - products[np.arange(len(relevant)), relevant]


def test_the_loss_is_cross_entropy_over_the_candidates():
  relevant = np.array([4, 0, 2])
  found = in_batch_loss(QUERIES, DOCUMENTS, relevant=relevant, temperature=0.1)
  wanted = nats(QUERIES.astype(float) @ DOCUMENTS.astype(float).T / 0.1, relevant)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
  plain = in_batch_loss(QUERIES, DOCUMENTS)
  np.testing.assert_allclose(plain, nats(QUERIES @ DOCUMENTS.T, [0, 1, 2]), rtol=1e-5)


def test_hidden_candidates_do_not_count_and_may_be_all_others():
  unseen = np.array([[0, 1, 0, 0, 1, 0], [0] * 6, [1] * 6], bool)
  found = in_batch_loss(QUERIES, DOCUMENTS, hidden=unseen)
  wanted = nats(QUERIES[:1] @ DOCUMENTS[[0, 2, 3, 5]].T, [0])
  np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
  assert float(found[2]) == 0  # its own document is left, though it was said to be hidden
  total = lambda queries: in_batch_loss(queries, DOCUMENTS, hidden=unseen).sum()
  chex.assert_tree_all_finite(jax.grad(total)(jnp.asarray(QUERIES)))


def test_copies_of_the_answer_and_the_querys_own_text_are_hidden():
  document_keys, relevant, keys = (
    np.array([5, 6, 5, 7, 8]),
    np.array([0, 1, 2]),
    np.array([7, 5, 9]),
  )
  wanted = [
    [document_keys[c] in (document_keys[r], key) and c != r for c in range(5)]
    for r, key in zip(relevant, keys, strict=True)
  ]
  np.testing.assert_array_equal(ranking.hidden(document_keys, relevant, keys), wanted)
  without = ranking.hidden(document_keys, relevant)
  assert np.asarray(without).sum() == 2 and without[0, 2] and without[2, 0]


def batch(documents=2):
  """Three queries of up to four tokens, and two documents for each."""
  rng = np.random.default_rng(3)
  return {
    "tokens": rng.integers(0, V, (3, 4)),
    "segment_ids": np.where(np.arange(4)[None] < np.array([[4], [2], [3]]), 0, -1),
    "document_tokens": rng.integers(0, V, (3, documents, 5)),
    "document_segment_ids": np.where(
      np.arange(5)[None, None] < np.array([[5, 3], [1, 2], [4, 4]])[..., None], 0, -1
    ),
  }


def means(tokens, ids, unit=True):
  """What an encoder with an embedding for a module gives, in float64."""
  table = np.asarray(TABLE["embedding"], np.float64)
  rows = [table[row[own >= 0]].mean(0) for row, own in zip(tokens, ids, strict=True)]
  return np.array([row / np.linalg.norm(row) if unit else row for row in rows])


class Embedding(nn.Module):
  """An embedding, NaN at padding."""

  @nn.compact
  def __call__(self, tokens, *, segment_ids=None):
    x = nn.Embed(V, D)(tokens)
    return x if segment_ids is None else jnp.where(segment_ids[..., None] < 0, jnp.nan, x)


@pytest.mark.parametrize(("pool", "unit"), [("mean", True), ("mean", False), ("first", False)])
def test_encoders_read_what_is_there(pool, unit):
  given = batch()
  queries = {name: given[name] for name in ("tokens", "segment_ids")}
  encoder, params = Encoder(Embedding(), pool, unit), {"Embed_0": TABLE}
  found = encoder(params, queries)
  if pool == "mean":
    wanted = means(given["tokens"], given["segment_ids"], unit)
  else:
    wanted = np.asarray(TABLE["embedding"])[given["tokens"][:, 0]]
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  left = {name: x[:, ::-1] for name, x in queries.items()}  # padding before the text
  if pool == "first":
    wanted = np.asarray(TABLE["embedding"])[
      [given["tokens"][i, n] for i, n in enumerate((3, 1, 2))]
    ]
  np.testing.assert_allclose(encoder(params, left), wanted, rtol=1e-5)


def test_a_row_without_tokens_is_zero_and_has_a_gradient():
  nothing = {"tokens": np.zeros((1, 3), int), "segment_ids": np.full((1, 3), -1)}
  value, grads = jax.value_and_grad(
    lambda p: Encoder(EMBED)(p, {"tokens": nothing["tokens"]}).sum()
  )({"embedding": jnp.zeros((V, D))})
  assert float(value) == 0
  chex.assert_tree_all_finite(grads)
  found = Encoder(Embedding())({"Embed_0": TABLE}, nothing)
  assert not np.asarray(found).any()


def test_the_objective_is_the_loss_of_its_vectors():
  given = batch()
  objective = in_batch(Encoder(Embedding()), temperature=0.5)
  loss, metrics = objective({"Embed_0": TABLE}, given, None)
  queries = means(given["tokens"], given["segment_ids"])
  documents = means(
    given["document_tokens"].reshape(6, 5), given["document_segment_ids"].reshape(6, 5)
  )
  products = queries @ documents.T / 0.5
  np.testing.assert_allclose(loss, nats(products, [0, 2, 4]).mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["accuracy"], np.mean(products.argmax(1) == [0, 2, 4]))
  assert float(metrics["weight"]) == 3
  plain = {k: x for k, x in given.items() if not k.startswith("document")}
  vectors = plain | {"documents": jnp.asarray(documents.reshape(3, 2, D), jnp.float32)}
  np.testing.assert_allclose(objective({"Embed_0": TABLE}, vectors, None)[0], loss, rtol=1e-5)
  grads = jax.grad(lambda p: objective(p, vectors, None)[0])({"Embed_0": TABLE})
  unread = sorted(set(range(V)) - set(given["tokens"][given["segment_ids"] >= 0]))
  assert unread and not np.asarray(grads["Embed_0"]["embedding"])[unread].any()


def test_padding_has_no_influence():
  given = batch()
  objective = jax.jit(jax.value_and_grad(in_batch(Encoder(Embedding())), has_aux=True))
  (loss, _), grads = objective({"Embed_0": TABLE}, given, None)
  other = lambda tokens, ids: np.where(ids < 0, (tokens + 4) % V, tokens)
  changed = given | {
    "tokens": other(given["tokens"], given["segment_ids"]),
    "document_tokens": other(given["document_tokens"], given["document_segment_ids"]),
  }
  (same, _), others = objective({"Embed_0": TABLE}, changed, None)
  assert np.isfinite(loss) and float(loss) == float(same)
  chex.assert_trees_all_equal(grads, others)
  chex.assert_tree_all_finite(grads)


def test_documents_may_have_an_encoder_of_their_own():
  given, frozen = batch(), {"Embed_0": {"embedding": -TABLE["embedding"]}}
  encoder = Encoder(Embedding())
  apart = in_batch(encoder, documents=lambda params, batch, rng: encoder(frozen, batch))
  same = in_batch(encoder)
  found, other = (f({"Embed_0": TABLE}, given, None)[0] for f in (apart, same))
  products = (
    means(given["tokens"], given["segment_ids"])
    @ -means(given["document_tokens"].reshape(6, 5), given["document_segment_ids"].reshape(6, 5)).T
  )
  np.testing.assert_allclose(found, nats(products, [0, 2, 4]).mean(), rtol=1e-5)
  assert float(other) != float(found)


def test_keys_hide_copies():
  given = batch()
  given["document_tokens"][1, 0] = given["document_tokens"][0, 0]
  given["document_segment_ids"][1, 0] = given["document_segment_ids"][0, 0]
  keys = {"document_keys": np.array([[1, 2], [1, 4], [5, 6]]), "keys": np.array([6, 8, 9])}
  loss, _ = in_batch(Encoder(Embedding()))({"Embed_0": TABLE}, given | keys, None)
  queries = means(given["tokens"], given["segment_ids"])
  documents = means(
    given["document_tokens"].reshape(6, 5), given["document_segment_ids"].reshape(6, 5)
  )
  products = queries @ documents.T
  wanted = [
    nats(products[:1, [0, 1, 3, 4]], [0]),
    nats(products[1:2, [1, 2, 3, 4, 5]], [1]),
    nats(products[2:, :], [4]),
  ]
  np.testing.assert_allclose(loss, np.mean(wanted), rtol=1e-5)


def test_it_trains():
  optimizer = optax.adam(0.05)
  state = init_state({"Embed_0": jax.tree.map(jnp.array, TABLE)}, optimizer)
  step = make_train_step(in_batch(Encoder(Embedding()), temperature=0.1), optimizer)
  losses = []
  for _ in range(20):
    state, metrics = step(state, batch(), jax.random.key(0))
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0] / 2


def test_ranks_count_what_scores_at_least_as_high():
  queries, documents = QUERIES.astype(float), DOCUMENTS.astype(float)
  relevant = np.array([3, 1, 5])
  wanted = [
    list(np.argsort(-(documents @ query))).index(row) + 1
    for query, row in zip(queries, relevant, strict=True)
  ]
  found = ranking.ranks(queries, documents, relevant)
  np.testing.assert_array_equal(found, wanted)
  unseen = np.zeros((3, 6), bool)
  unseen[0, np.argmax(documents @ queries[0])] = wanted[0] > 1
  fewer = ranking.ranks(queries, documents, relevant, hidden=unseen)
  np.testing.assert_array_equal(fewer, np.array(wanted) - unseen.sum(1))


def test_an_encoder_that_tells_nothing_apart_finds_nothing():
  same = np.ones((6, D))
  np.testing.assert_array_equal(ranking.ranks(QUERIES, same, np.array([0, 3, 5])), 6)
  np.testing.assert_array_equal(ranking.ranks(QUERIES * np.nan, DOCUMENTS, np.array([0, 3, 5])), 6)


def test_recall_and_reciprocal_rank():
  places = np.array([1, 2, 5, 100])
  assert ranking.recall(places, 1) == 0.25 and ranking.recall(places, 5) == 0.75
  np.testing.assert_allclose(ranking.mean_reciprocal_rank(places), (1 + 0.5 + 0.2 + 0.01) / 4)


def test_bad_input_is_named():
  objective = in_batch(Encoder(Embedding()))
  queries = {name: x for name, x in batch().items() if not name.startswith("document")}
  for message, call in {
    "pool='max'; allowed: 'mean', 'first'": lambda: Encoder(EMBED, "max"),
    "temperature 0": lambda: in_batch(Encoder(EMBED), temperature=0.0),
    "temperature -1": lambda: in_batch_loss(QUERIES, DOCUMENTS, temperature=-1.0),
    "relevant": lambda: in_batch_loss(QUERIES, DOCUMENTS, relevant=np.array([0, 1, 6])),
    "no documents": lambda: objective({"Embed_0": TABLE}, queries, None),
    "nobody reads domain": lambda: objective({"Embed_0": TABLE}, batch() | {"domain": 0}, None),
    "k 0": lambda: ranking.recall(np.array([1]), 0),
  }.items():
    with pytest.raises(ValueError, match=message):
      call()
