"""Retrieval with a dual encoder (Modular Retrieval, Liang et al., arXiv 2303.13419, section 3).

Queries and documents become vectors, and a document answers a query as far as their dot product is
large. Training moves a query to its document and away from the others of its batch. What makes
it modular is a prefix of the queries, P_general + Σ_a attr_a·P_a, which is the model's affair:
`prefix.add` puts it on, and `attributes` in the batch choose its modules. In the paper documents
take no prefix, so that their vectors are computed once; in its published code they take the general
one, as rows without attributes do.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from effjax.core.known import check_ids, number
from effjax.core.numerics import wide, zero_unless
from effjax.core.typing import Array, Bool, Float, Integer, Key, Params, Scalar
from effjax.layers.forward import forward, layer_means, sown_values
from effjax.layers.objective import Batch, Objective
from effjax.peft.ranking import hidden as hidden_candidates

POOLS = ("mean", "first")
OF_DOCUMENTS = "document_"


@dataclasses.dataclass(frozen=True)
class Encoder:
  """Rows of tokens as vectors: encoder(params, batch) → [B, D].

  Attributes:
    module: tokens → hidden states [B, T, D].
    pool: what stands for a row: the mean over its tokens ("mean"), or its first token ("first").
    unit: whether vectors are divided by their lengths, so that dot products are cosines.

  Raises:
    ValueError: for another pool.

  Example:
    >>> table = {"embedding": jnp.array([[3.0, 4.0], [1.0, 0.0]])}
    >>> encoder = Encoder(nn.Embed(2, 2), pool="first")
    >>> print(encoder(table, {"tokens": jnp.array([[0, 1]])}))
    [[0.6 0.8]]
  """

  module: nn.Module
  pool: str = "mean"
  unit: bool = True

  def __post_init__(self):
    if self.pool not in POOLS:
      raise ValueError(f"pool={self.pool!r}; allowed: {', '.join(map(repr, POOLS))}")

  def __call__(self, params: Params, batch: Batch, rng: Key | None = None) -> Float[Array, "B D"]:
    """The vector of each row; padding, where a segment id is negative, has no influence.

    Raises:
      ValueError: for an entry of the batch that the module does not read.
    """
    return self.run(params, batch, rng)[0]

  def run(self, params: Params, batch: Batch, rng: Key | None = None) -> tuple[Array, Mapping]:
    """The vectors, and what the layers sowed."""
    hidden, sown = forward(self.module, params, batch, rng, read=("segment_ids",))
    ids = batch.get("segment_ids")
    there = jnp.ones(hidden.shape[:2], bool) if ids is None else jnp.asarray(ids) >= 0
    hidden = zero_unless(there, hidden.astype(wide(hidden.dtype)))
    if self.pool == "mean":
      pooled = hidden.sum(1) / jnp.maximum(there.sum(1), 1)[:, None]
    else:
      pooled = jnp.take_along_axis(hidden, there.argmax(1)[:, None, None], axis=1)[:, 0]
    return _of_length_one(pooled) if self.unit else pooled, sown


def in_batch(
  encoder: Encoder,
  *,
  documents: Callable[[Params, Batch, Key | None], Array] | None = None,
  temperature: Scalar = 1.0,
) -> Objective:
  """The objective (params, batch, rng) → (loss, metrics) of `in_batch_loss`, plus sown losses.

  The batch holds queries as the encoder reads them (tokens [B, T], `segment_ids`, `attributes` …),
  and of each 1 + H documents, the one that answers it and H hard negatives, which are candidates of
  all queries:
    documents: [B, 1 + H, D], vectors that do not train; or
    document_tokens: [B, 1 + H, S], and `document_segment_ids`, `document_attributes` … like these.
    document_keys: [B, 1 + H], optional; equal ids are equal texts, and so is
    keys: [B], those of the queries; see `ranking.hidden`.
  Microbatches are batches of their own, with fewer candidates. Metrics: "accuracy", the share of
  queries that find their document, "weight" (queries), and what the encoder's layers sow.

  Args:
    encoder: of queries.
    documents: (params, batch, rng) → vectors [B (1 + H), D] of documents that come as tokens; None
      is the encoder itself, trained through both.
    temperature: τ.

  Raises:
    ValueError: for a temperature that is not above 0, a batch without documents, and entries that
      nobody reads.

  Example:
    >>> encoder = Encoder(nn.Embed(2, 2), unit=False)
    >>> batch = {"tokens": jnp.array([[0], [1]]), "document_tokens": jnp.array([[[0]], [[1]]])}
    >>> loss, metrics = in_batch(encoder)({"embedding": 9.0 * jnp.eye(2)}, batch, None)
    >>> round(float(loss), 4), float(metrics["accuracy"])
    (0.0, 1.0)
  """
  temperature = number("temperature", temperature, above=0)
  of_documents = None if documents is None else Partial(documents)
  return Partial(functools.partial(_in_batch, encoder), of_documents, temperature)


def _in_batch(encoder: Encoder, documents, temperature, params, batch, rng):
  own = {k: x for k, x in batch.items() if not k.startswith("document") and k != "keys"}
  rngs = (None, None) if rng is None else tuple(jax.random.split(rng))
  queries, sown = encoder.run(params, own, rngs[0])
  candidates, others = _candidates(encoder, documents, params, batch, rngs[1])
  count, each = queries.shape[0], candidates.shape[0] // queries.shape[0]
  relevant = each * jnp.arange(count)
  flat = {k: jnp.asarray(batch[k]).reshape(-1) for k in ("document_keys", "keys") if k in batch}
  unseen = None
  if "document_keys" in flat:
    unseen = hidden_candidates(flat["document_keys"], relevant, flat.get("keys"))
  losses, found = _losses(queries, candidates, relevant, unseen, temperature)
  sown_losses = [layer_means(x.get("losses", {})) for x in (sown, others) if x]
  added = sum(sum(x.values()) for x in sown_losses) / max(len(sown_losses), 1)
  metrics = {"accuracy": found.mean(), "weight": jnp.float32(count)}
  return losses.mean() + added, {**sown_values(sown), **metrics}


def _candidates(encoder, documents, params, batch, rng) -> tuple[Array, Mapping]:
  """The vectors of all documents of a batch, and what was sown on the way to them."""
  if "documents" in batch:
    return jax.lax.stop_gradient(_flat(batch["documents"])), {}
  if f"{OF_DOCUMENTS}tokens" not in batch:
    raise ValueError("batch: no documents; allowed: documents or document_tokens of each query")
  given = {
    name.removeprefix(OF_DOCUMENTS): _flat(x)
    for name, x in batch.items()
    if name.startswith(OF_DOCUMENTS) and name != "document_keys"
  }
  return (
    encoder.run(params, given, rng) if documents is None else (documents(params, given, rng), {})
  )


def in_batch_loss(
  queries: Float[Array | np.ndarray, "B D"],
  documents: Float[Array | np.ndarray, "C D"],
  *,
  relevant: Integer[Array | np.ndarray, "B"] | None = None,
  hidden: Bool[Array | np.ndarray, "B C"] | None = None,
  temperature: Scalar = 1.0,
) -> Float[Array, "B"]:
  """−log softmax_c(q·d_c / τ) at the relevant document, of each query, in nats and float32.

  Args:
    queries, documents: vectors.
    relevant: the row of the document that answers each query; None means 0 … B − 1.
    hidden: candidates that do not count for a query; its relevant document always does.
    temperature: τ > 0; 1 is the raw dot product.

  Raises:
    ValueError: for a row that there is not, or a temperature that is not above 0, where known.

  Example:
    >>> losses = in_batch_loss(jnp.zeros((2, 3)), jnp.ones((4, 3)))
    >>> [round(float(loss), 4) for loss in losses]
    [1.3863, 1.3863]
  """
  temperature = number("temperature", temperature, above=0)
  rows = jnp.arange(queries.shape[0]) if relevant is None else jnp.asarray(relevant)
  check_ids("relevant", rows, documents.shape[0])
  return _losses(jnp.asarray(queries), jnp.asarray(documents), rows, hidden, temperature)[0]


def _losses(queries, documents, relevant, unseen, temperature) -> tuple[Array, Array]:
  """Of each query the loss, and whether no other candidate has as large a product."""
  products = jnp.matmul(queries, documents.T, preferred_element_type=jnp.float32) / temperature
  right = jnp.take_along_axis(products, relevant[:, None], axis=1)
  is_right = jnp.arange(products.shape[1])[None] == relevant[:, None]
  seen = products if unseen is None else jnp.where(unseen & ~is_right, -jnp.inf, products)
  losses = jax.nn.logsumexp(seen, axis=1) - right[:, 0]
  return losses, (is_right | (right > seen)).all(1)


def _flat(x: Any) -> Array:
  x = jnp.asarray(x)
  return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _of_length_one(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
  """x / |x|; zeros stay."""
  square = jnp.square(x).sum(-1, keepdims=True)
  return x / jnp.sqrt(jnp.where(square > 0, square, 1))
