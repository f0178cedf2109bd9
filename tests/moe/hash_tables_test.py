"""Tables against what they are by definition, in plain loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.layers import MLP, Context, LayerSpec, TransformerConfig
from effjax.moe import Hash, MoE, MultiHash, hash_tables

ZIPF = (1e6 / np.arange(1, 501) ** 0.8).round()
BLOBS = np.repeat(np.arange(6), 20)
POINTS = (10 * np.eye(6)[BLOBS] + np.random.default_rng(0).normal(0, 0.1, (120, 6))).astype(
  np.float32
)


def greedy(counts, experts):
  """The most frequent first, to the least loaded; the uncounted to whoever has the fewest ids."""
  load, held, table = [0.0] * experts, [0] * experts, [0] * len(counts)
  for index in sorted(range(len(counts)), key=lambda i: -counts[i]):
    order = (lambda e: (load[e], held[e], e)) if counts[index] else (lambda e: (held[e], e))
    expert = table[index] = min(range(experts), key=order)
    load[expert] += counts[index]
    held[expert] += 1
  return table


@pytest.mark.parametrize("experts", [1, 3, 16, 700])
def test_a_balanced_table_is_greedy(experts):
  counts = np.random.default_rng(experts).permutation(np.concatenate([ZIPF, np.zeros(60)]))
  assert hash_tables.balanced(counts, experts=experts).tolist() == greedy(counts, experts)


def test_balanced_tables_of_seeds_differ_and_are_balanced_too():
  tables = [hash_tables.balanced(ZIPF, experts=8, seed=seed) for seed in (None, 0, 1)]
  loads = [hash_tables.statistics(table, ZIPF, experts=8).max_load for table in tables]
  by_chance = hash_tables.statistics(hash_tables.random(500, experts=8), ZIPF, experts=8)
  assert max(loads) < 1.02 < by_chance.max_load
  together = [table[:, None] == table[None] for table in tables]
  for other in together[1:]:  # as a random one would, not the same groups under other names
    assert (together[0] & other).sum() < 0.25 * together[0].sum()


def test_ids_that_were_never_seen_are_spread_over_all_experts():
  table = hash_tables.balanced(np.concatenate([[1e6, 10.0], np.zeros(998)]), experts=10)
  assert np.bincount(table).tolist() == [100] * 10


def test_random_tables_are_uniform_and_of_their_seed():
  tables = [hash_tables.random(64_000, experts=64, seed=seed) for seed in (0, 0, 1)]
  assert (tables[0] == tables[1]).all() and 0.01 < (tables[0] == tables[2]).mean() < 0.02
  chi = (np.square(np.bincount(tables[0], minlength=64) - 1000) / 1000).sum()
  assert 25 < chi < 115  # of 63 degrees of freedom
  assert all(table.dtype == np.int32 and table.shape == (64_000,) for table in tables)


def test_kmeans_ends_where_no_point_moves():
  nearest, centres = hash_tables.kmeans(POINTS, clusters=9, seed=3)
  distances = np.square(POINTS[:, None].astype(float) - centres[None]).sum(-1)
  assert (nearest == distances.argmin(1)).all()
  for k in range(9):
    np.testing.assert_allclose(centres[k], POINTS[nearest == k].mean(0), atol=1e-5)
  assert (hash_tables.kmeans(POINTS, clusters=9, seed=3)[0] == nearest).all()


def test_clusters_are_found_and_dispersed_over_all_experts():
  clusters = hash_tables.clustered(POINTS, experts=6)
  assert all(len(set(clusters[blob == BLOBS])) == 1 for blob in range(6))
  assert len(set(clusters.tolist())) == 6
  for experts in (6, 7, 32):
    table = hash_tables.dispersed(clusters, experts=experts)
    for part in [clusters == k for k in range(6)] + [clusters >= 0]:
      sizes = np.bincount(table[part], minlength=experts)
      assert sizes.max() - sizes.min() <= 1
    assert (table == hash_tables.dispersed(clusters, experts=experts)).all()
    assert (table != hash_tables.dispersed(clusters, experts=experts, seed=1)).any()


def test_every_cluster_has_points_though_all_of_them_are_alike():
  assert np.bincount(hash_tables.clustered(np.ones((5, 2)), experts=5)).tolist() == [1] * 5
  few = np.repeat(np.array([[0.0], [1.0]]), 4, axis=0)
  assert (np.bincount(hash_tables.clustered(few, experts=3), minlength=3) > 0).all()


def test_statistics_are_those_of_the_load():
  table, counts = np.array([[0, 1], [2, 2], [0, 3]]), np.array([1.0, 2.0, 0.5])
  found = hash_tables.statistics(table, counts, experts=5)
  load = np.array([1.5, 1, 4, 0.5, 0]) / 7
  np.testing.assert_allclose(found.load, load)
  assert found.max_load == pytest.approx(5 * 4 / 7) and found.unused == 1
  assert found.entropy == pytest.approx(-(load[:4] * np.log(load[:4])).sum())
  even = hash_tables.statistics(hash_tables.position(12, experts=4), experts=4)
  assert even.max_load == 1 and even.entropy == pytest.approx(np.log(4)) and not even.unused


def test_bigrams_are_spread_over_the_buckets():
  tokens, previous = (x.reshape(1, -1) for x in np.mgrid[:40, -1:39])
  ids = hash_tables.bigram_ids(jnp.asarray(tokens), jnp.asarray(previous), entries=2**20)
  distinct = len(np.unique(ids))  # of 1600 drawn from 2^20, one or two meet
  assert 1595 <= distinct <= 1600 and ids.min() >= 0
  few = hash_tables.bigram_ids(jnp.asarray(tokens), jnp.asarray(previous), entries=16)
  chi = (np.square(np.bincount(few[0], minlength=16) - 100) / 100).sum()
  assert chi < 38  # of 15 degrees of freedom


def test_the_next_id_is_of_the_same_segment():
  tokens, ids = jnp.array([[4, 5, 6, 7, 8]]), jnp.array([[0, 0, 2, 2, -1]])
  assert hash_tables.next_ids(Context(tokens)).tolist() == [[5, 6, 7, 8, -1]]
  assert hash_tables.next_ids(Context(tokens, segment_ids=ids)).tolist() == [[5, -1, 7, -1, -1]]


LAYERS = (LayerSpec(None, MoE(Hash(2, 5), MLP(6))),) * 3
CONFIG = TransformerConfig(5, 4, (*LAYERS, LayerSpec(None, MultiHash(Hash(3, 5, hashes=2), 4))))


def empty():
  """The places of its tables."""
  place = lambda *shape: {"layers_0": {"ffn": {"router": {"table": jnp.zeros(shape, jnp.int32)}}}}
  return {"segments_0": place(3, 5, 1), "segments_1": place(5, 2)}


def test_tables_are_put_into_the_layers_one_by_one():
  tables = [np.arange(5) % 2, np.ones(5, int), np.zeros((5, 1), np.int64), np.eye(5, 2, dtype=int)]
  found = hash_tables.put(CONFIG, empty(), tables)
  first, second = (found[f"segments_{i}"]["layers_0"]["ffn"]["router"]["table"] for i in (0, 1))
  assert first[..., 0].tolist() == [[0, 1, 0, 1, 0], [1] * 5, [0] * 5]
  assert second.tolist() == tables[3].tolist() and first.dtype == second.dtype == jnp.int32


def test_one_table_is_for_every_layer():
  config = TransformerConfig(5, 4, LAYERS)
  found = hash_tables.put(config, {"segments_0": empty()["segments_0"]}, np.array([1, 0, 0, 1, 1]))
  table = found["segments_0"]["layers_0"]["ffn"]["router"]["table"]
  assert table[..., 0].tolist() == [[1, 0, 0, 1, 1]] * 3


WRONG = {
  "counts .* allowed: a vector": lambda: hash_tables.balanced([1.0, -1.0], experts=2),
  "experts=0; allowed: from 1": lambda: hash_tables.balanced([1.0], experts=0),
  "seed=-1; allowed: from 0": lambda: hash_tables.random(4, experts=2, seed=-1),
  "clusters=3; allowed: 1 … 2": lambda: hash_tables.clustered(np.eye(2), experts=3),
  r"points \(1, 1\); allowed: finite": lambda: hash_tables.kmeans(np.array([[np.nan]]), clusters=1),
  "clusters float64": lambda: hash_tables.dispersed(np.ones(2), experts=2),
  "3 counts .* allowed: 2": lambda: hash_tables.statistics(
    np.zeros(2, int), [1.0, 1.0, 1.0], experts=2
  ),
  "table: id 2 at": lambda: hash_tables.statistics(np.array([0, 2]), experts=2),
  "1 tables; allowed: one, or as many .* 4": lambda: hash_tables.put(
    CONFIG, empty(), [np.ones(5, int)]
  ),
  r"layer 0: ffn/router: table \(6,\); allowed: \(5, 1\), of 5 ids": lambda: hash_tables.put(
    CONFIG, empty(), np.zeros(6, int)
  ),
  "layer 0: ffn/router: table: id 2": lambda: hash_tables.put(CONFIG, empty(), np.full(5, 2)),
  r"layer 3: ffn/router: table \(5,\); allowed: \(5, 2\)": lambda: hash_tables.put(
    CONFIG, empty(), np.zeros(5, int)
  ),
  "allowed: one, or as many as the model has Hash routers, 0": lambda: hash_tables.put(
    TransformerConfig(5, 4, ()), {}, np.zeros(5, int)
  ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_named(message):
  with pytest.raises(ValueError, match=message):
    WRONG[message]()
