import numpy as np
import pytest

from effjax.cost import expected_tokens, operations, speedup

# Leviathan et al., Table 1: α, γ, operations, speed.
TABLE = [
  (0.6, 2, 1.53, 1.96),
  (0.7, 3, 1.58, 2.53),
  (0.8, 2, 1.23, 2.44),
  (0.8, 5, 1.63, 3.69),
  (0.9, 2, 1.11, 2.71),
  (0.9, 10, 1.60, 6.86),
]
# Measured there: α, γ, published speed-up, and whether it exceeds what a free draft can reach.
MEASURED = [
  (0.75, 7, 3.4, False),
  (0.8, 7, 2.8, False),
  (0.82, 7, 1.7, False),
  (0.62, 7, 2.6, True),
  (0.68, 5, 2.4, False),
  (0.71, 3, 1.4, False),
  (0.65, 5, 3.1, True),
  (0.73, 5, 3.0, False),
  (0.74, 3, 2.2, False),
  (0.53, 5, 2.3, True),
  (0.55, 3, 2.2, True),
  (0.56, 3, 1.7, False),
]


@pytest.mark.parametrize(("alpha", "gamma", "ops", "speed"), TABLE)
def test_published_table(alpha, gamma, ops, speed):
  assert operations(alpha, gamma) == pytest.approx(ops, abs=0.005)
  assert speedup(alpha, gamma) == pytest.approx(speed, abs=0.005)


@pytest.mark.parametrize(("alpha", "gamma", "published", "exceeds"), MEASURED)
def test_which_published_speedups_exceed_the_bound(alpha, gamma, published, exceeds):
  assert (published > speedup(alpha, gamma)) == exceeds


def test_expected_tokens_is_the_mean_of_simulated_rounds():
  accepted = np.random.default_rng(0).random((200_000, 4)) < 0.7
  tokens = np.cumprod(accepted, axis=1).sum(1) + 1
  assert expected_tokens(0.7, 4) == pytest.approx(tokens.mean(), abs=0.01)


def test_no_draft_is_plain_decoding():
  assert expected_tokens(0.3, 0) == pytest.approx(1)
  assert speedup(0.3, 0, 0.5) == pytest.approx(1)


@pytest.mark.parametrize("arguments", [(1.2, 2, 0), (0.5, -1, 0), (0.5, 2, -0.1)])
def test_bad_arguments(arguments):
  with pytest.raises(ValueError, match="allowed"):
    speedup(*arguments)
