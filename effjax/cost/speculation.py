"""What speculative decoding gains (Leviathan et al., arXiv 2211.17192, section 3).

α is the probability that the target accepts a drafted token, α = Σ_x min(p(x), q(x)) averaged over
contexts; γ the tokens drafted a round; c the time of one draft step over that of one target step.
"""


def expected_tokens(alpha: int | float, gamma: int) -> float:
  """Tokens a round yields: 1 + α + … + α^γ = (1 − α^(γ+1)) / (1 − α) (equation 1).

  Raises:
    ValueError: for an α outside 0 … 1 or a negative γ.

  Example:
    >>> round(expected_tokens(0.6, 2), 2), round(expected_tokens(0.9, 10), 2)
    (1.96, 6.86)
    >>> expected_tokens(1.0, 4)
    5.0
  """
  _check(alpha, gamma)
  if alpha == 1:
    return float(gamma + 1)
  return (1 - alpha ** (gamma + 1)) / (1 - alpha)


def speedup(alpha: int | float, gamma: int, c: int | float = 0.0) -> float:
  """Factor by which wall time improves: expected_tokens(α, γ) / (γ·c + 1) (theorem 3.8).

  c = 0 is the bound that a free draft reaches.

  Raises:
    ValueError: as `expected_tokens`, and for a negative c.

  Example:
    >>> round(speedup(0.8, 5, 0.05), 2)
    2.95
  """
  if c < 0:
    raise ValueError(f"c {c}; allowed: from 0")
  return expected_tokens(alpha, gamma) / (gamma * c + 1)


def operations(alpha: int | float, gamma: int, c: int | float = 0.0) -> float:
  """Factor by which arithmetic grows: (γ·c + γ + 1) / expected_tokens(α, γ) (theorem 3.11).

  `c` is here the ratio of operations, draft to target.

  Raises:
    ValueError: as `speedup`.

  Example:
    >>> round(operations(0.6, 2), 2), round(operations(0.9, 10), 2)
    (1.53, 1.6)
  """
  if c < 0:
    raise ValueError(f"c {c}; allowed: from 0")
  return (gamma * c + gamma + 1) / expected_tokens(alpha, gamma)


def _check(alpha: int | float, gamma: int) -> None:
  if not 0 <= alpha <= 1:
    raise ValueError(f"alpha {alpha}; allowed: 0 to 1")
  if gamma < 0:
    raise ValueError(f"gamma {gamma}; allowed: from 0")
