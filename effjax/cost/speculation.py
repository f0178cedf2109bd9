"""What speculative decoding gains (Leviathan et al., arXiv 2211.17192, section 3).

α is the probability that the target accepts a drafted token, α = Σ_x min(p(x), q(x)) averaged over
contexts; γ the tokens drafted a round; c the time of one draft step over that of one target step.
"""

import math

from effjax.core.known import number
from effjax.core.typing import Number, Size


def expected_tokens(alpha: Number, gamma: Size) -> float:
  """Tokens a round yields: 1 + α + … + α^γ = (1 − α^(γ+1)) / (1 − α) (equation 1).

  Raises:
    ValueError: for an α outside 0 … 1 or a negative γ.

  Example:
    >>> round(expected_tokens(0.6, 2), 2), round(expected_tokens(0.9, 10), 2)
    (1.96, 6.86)
    >>> expected_tokens(1.0, 4)
    5.0
  """
  alpha, gamma = _checked(alpha, gamma)
  return math.fsum(alpha**i for i in range(gamma + 1))


def speedup(alpha: Number, gamma: Size, c: Number = 0.0) -> float:
  """Factor by which wall time improves: expected_tokens(α, γ) / (γ·c + 1) (theorem 3.8).

  c = 0 is the bound that a free draft reaches.

  Raises:
    ValueError: as `expected_tokens`, and for a negative c.

  Example:
    >>> round(speedup(0.8, 5, 0.05), 2)
    2.95
  """
  _, gamma = _checked(alpha, gamma)
  return expected_tokens(alpha, gamma) / (gamma * number("c", c, least=0) + 1)


def operations(alpha: Number, gamma: Size, c: Number = 0.0) -> float:
  """Factor by which arithmetic grows: (γ·c + γ + 1) / expected_tokens(α, γ) (theorem 3.11).

  `c` is here the ratio of operations, draft to target.

  Raises:
    ValueError: as `speedup`.

  Example:
    >>> round(operations(0.6, 2), 2), round(operations(0.9, 10), 2)
    (1.53, 1.6)
  """
  _, gamma = _checked(alpha, gamma)
  return (gamma * number("c", c, least=0) + gamma + 1) / expected_tokens(alpha, gamma)


def _checked(alpha: Number, gamma: Size) -> tuple[float | int, int]:
  alpha = number("alpha", alpha, least=0, most=1)
  return alpha, number("gamma", gamma, integer=True, least=0)
