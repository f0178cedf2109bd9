"""What a way to split an MLP is, and the simplest: at random."""

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.typing import Array, Int, Key, Size
from effjax.moe.units import Site, of_known


class Parts(NamedTuple):
  """Which hidden units go where.

  Attributes:
    experts: [E, n], those of each expert.
    shared: [m], those that every token visits; None is none.
  """

  experts: Int[Array | np.ndarray, "E n"]
  shared: Int[Array | np.ndarray, "m"] | None = None

  @classmethod
  def of_labels(cls, among: Int[np.ndarray, "F"], labels: Int[np.ndarray, "F"]) -> "Parts":
    """The units `among`, of which `labels` says the expert; all experts have as many.

    Example:
      >>> Parts.of_labels(np.array([7, 8, 9, 6]), np.array([1, 0, 0, 1])).experts.tolist()
      [[8, 9], [7, 6]]
    """
    experts = int(labels.max(initial=0)) + 1
    return cls(among[np.argsort(labels, kind="stable")].reshape(experts, -1))


@runtime_checkable
class Way(Protocol):
  """A way to split the hidden units of an MLP into experts."""

  def __call__(self, site: Site, among: Int[np.ndarray, "F"], experts: Size, key: Key) -> Parts:
    """Which of the units `among` each of the experts gets.

    Raises:
      ValueError: for a number of units that cannot be split so.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Random:
  """A way to split: at random, every unit in one expert, all of one size.

  LLaMA-MoE (Zhu et al., arXiv 2406.16554, section 3.1) found it the best of its ways.
  """

  def __call__(self, site: Site, among: Int[np.ndarray, "F"], experts: Size, key: Key) -> Parts:
    check_divides("experts", experts, len(among))
    return Parts(jax.random.permutation(key, jnp.asarray(among)).reshape(experts, -1))


def check_divides(name: str, experts: Size, units: Size) -> None:
  """Refuses numbers of experts that do not divide the units.

  Raises:
    ValueError: with those that do.

  Example:
    >>> check_divides("experts", 5, 12)
    Traceback (most recent call last):
    ValueError: experts=5 of 12 hidden units; allowed: 1, 2, 3, 4, 6, 12
  """
  if units % experts:
    allowed = ", ".join(str(n) for n in range(1, units + 1) if units % n == 0)
    raise ValueError(f"{name}={experts} of {units} hidden units; allowed: {allowed}")


def seed_of(key: Key) -> int:
  """A seed for what is drawn by numpy."""
  return int.from_bytes(of_known("key", jax.random.key_data(key)).tobytes(), "little")
