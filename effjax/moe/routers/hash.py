"""Hash layers: a token's experts are looked up in a table (Roller et al., arXiv 2106.04426)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.known import check_ids, is_id, number
from effjax.core.numerics import nan_unless
from effjax.core.typing import Array, Bool, Float, Integer, Size
from effjax.core.weights import materialize
from effjax.layers import Context, Routing, weight
from effjax.moe.losses import expert_shares
from effjax.moe.routers.hash_keys import KEYS, HashKey
from effjax.moe.routers.health import sow_health


def hash_routing(
  ids: Integer[Array | np.ndarray, "..."],
  table: Integer[Array | np.ndarray, "V *N"],
  *,
  experts: Size | None = None,
) -> Routing:
  """Each token to experts table[id], with gates of 1: nothing is learned (section 3.1).

  Args:
    ids: an id for each token; −1 stands for no token, and reads the last entry.
    table: [V], the expert of each id, or [V, N], its N experts, one a hash.
    experts: number of experts E; None lets the table say any.

  Returns:
    A `Routing` to one expert, or N, without probabilities; the gates are NaN for a traced id that
    the table lacks, and for a traced expert that is none of E.

  Raises:
    ValueError: for a table of another form and, where they are known, for ids that it lacks and
      experts that are none of 0 … E − 1.

  Example:
    >>> routing = hash_routing(jnp.array([2, 0, 2]), jnp.array([5, 7, 1]))
    >>> routing.experts.tolist(), routing.gates.tolist()
    ([[1], [5], [1]], [[1.0], [1.0], [1.0]])
  """
  if table.ndim not in (1, 2) or not table.shape[0]:
    raise ValueError(f"hash_routing: table {table.shape}; allowed: [V] or [V, N]")
  columns = jnp.asarray(table).reshape(table.shape[0], -1)
  entries, count = columns.shape[0], jnp.iinfo(jnp.int32).max if experts is None else experts
  check_ids("table", table, number("experts", count, of="hash_routing", integer=True, least=1))
  check_ids("ids", ids, entries, ids != -1)
  ids = jnp.where(ids == -1, entries - 1, ids).astype(jnp.int32)
  chosen = columns[jnp.clip(ids, 0, entries - 1)].astype(jnp.int32)
  there = is_id(ids, entries)[..., None] & is_id(chosen, count)
  gates = nan_unless(there, jnp.ones(chosen.shape, jnp.float32))
  return Routing(jnp.where(there, chosen, 0), gates)


class Hash(nn.Module):
  """A router: each token to the expert that a table has for it, by `hash_routing`.

  The table is a parameter of integers, "table" [entries, hashes]: it never trains, counts as no
  parameter, is in every checkpoint, and layers that are scanned together have one each. At
  initialisation it is drawn, another for each layer; `hash_tables.put` puts in those that
  `hash_tables` builds.

  | by | a token is looked up by | entries |
  |---|---|---|
  | "token" | its id | the vocabulary |
  | "previous" | the id before it, of the same segment | the vocabulary |
  | "bigram" | both, see `bigram_ids` | any number of buckets |
  | "position" | its position, modulo the entries | any number |
  | "predicted" | the id that another model expects after it | the vocabulary |
  | "next" | the id that does come after it, of the same segment | the vocabulary |

  "next" peeks: it shows a causal model what it has to predict, and has no caches. "predicted" is a
  fact of the batch, which `hash_tables.predicted_ids` makes; a baseline that is causal makes it
  causal, and `decode.generate`, which has no other model to ask, refuses it.

  Sown are the load and the metrics that other routers sow of it, see `health.sow_health`.

  Attributes:
    experts: number of experts E.
    entries: ids that the table knows.
    by: see above.
    hashes: experts N of each token, one a column of the table; an `MoE` adds their outputs, a
      `MultiHash` makes segments of them.

  Raises:
    ValueError: when called, for another `by`, for numbers below 1, and where a fact is missing or,
      known, not in the table.
  """

  experts: Size
  entries: Size
  by: str = "token"
  hashes: Size = 1

  @nn.compact
  def __call__(
    self,
    rows: Float[Array, "M D"],
    context: Context = Context(),
    mask: Bool[Array, "M"] | None = None,
  ) -> Routing:
    key = self._key
    experts, entries, hashes = (
      number(name, getattr(self, name), of="Hash", integer=True, least=1)
      for name in ("experts", "entries", "hashes")
    )
    draw = lambda key, shape, _: jax.random.randint(key, shape, 0, experts)
    table = materialize(weight(self, "table", draw, (entries, hashes)))
    if self.is_initializing():  # which needs no facts
      return hash_routing(jnp.zeros(rows.shape[:1], jnp.int32), table, experts=experts)
    ids = key.ids(context, entries).reshape(-1)
    ids = ids if mask is None else jnp.where(mask, ids, 0)
    routing = hash_routing(ids, table, experts=experts)
    sow_health(self, expert_shares(routing.experts, experts, mask=mask))
    return routing

  @property
  def _key(self) -> HashKey:
    if self.by not in KEYS:
      raise ValueError(f"Hash: by={self.by!r}; allowed: {', '.join(KEYS)}")
    return KEYS[self.by]

  @property
  def reads(self) -> tuple[str, ...]:
    """The fields of `Context` that it reads."""
    return self._key.reads

  @property
  def peeks(self) -> bool:
    """Whether a token's expert depends on later tokens."""
    return self._key.peeks

  @property
  def vocabulary(self) -> int | None:
    """The tokens that its table knows, where it is a table of tokens."""
    return self.entries if self._key.role == "vocab" else None

  @property
  def used(self) -> float:
    """Experts that a token visits."""
    return float(self.hashes)

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward: none."""
    return 0.0

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    return {"table": (self._key.role, "hashes")}
