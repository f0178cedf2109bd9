"""Tables for hash layers, from ids to experts (Roller et al., arXiv 2106.04426, section 3.1).

Builders are functions of numpy that give int32 [V]; those that draw are determined by their seed.
Each row of the paper's table 3 is one of them, read by one of the keys of `Hash`:

| row | `Hash(by=…)` | table |
|---|---|---|
| balanced assignment | "token" | `balanced(counts)` |
| fixed random assignment | "token" | `random(V)`, or what a `Hash` starts with |
| token clustering | "token" | `clustered(embeddings)` of a trained model |
| dispersed hash | "token" | `dispersed(clusters)` |
| position | "position" | `position(E)` |
| bigrams | "bigram" | `random(buckets)` |
| previous token | "previous" | any of tokens |
| future token, predicted | "predicted" | any, and `predicted_ids(model, …)` in the batch |
| future token, oracle | "next" | any |
| 5 × 16, same hash | "token" | `put(config, params, table)` |
| 5 × 16, different hashes | "token" | `put(config, params, [table, …])`, or those at the start |
"""

from effjax.moe.hash_tables.balanced import balanced, position, random
from effjax.moe.hash_tables.clusters import clustered, dispersed, kmeans
from effjax.moe.hash_tables.model import predicted_ids, put
from effjax.moe.hash_tables.statistics import TableStatistics, statistics
from effjax.moe.routers.hash_keys import bigram_ids, next_ids

__all__ = [
  "TableStatistics",
  "balanced",
  "bigram_ids",
  "clustered",
  "dispersed",
  "kmeans",
  "next_ids",
  "position",
  "predicted_ids",
  "put",
  "random",
  "statistics",
]
