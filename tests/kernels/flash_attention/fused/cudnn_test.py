"""What cuDNN is not asked for. What it gives, only a GPU can show."""

import jax.numpy as jnp
import pytest

from effjax.attention.masks import Causal, Full, SlidingWindow, longformer
from effjax.kernels.flash_attention.fused import cudnn

CAUSAL = {"mask": Causal(), "bias": None, "logit_softcap": None, "segment_ids": None}
REFUSED = {
  "type float32": {"dtype": jnp.float32},
  "the log-sum-exp": {"return_lse": True},
  "mask": {"mask": longformer(4, (0,), causal=True)},
  "fewer queries than keys": {"T": 8},
  "a soft cap": {"logit_softcap": 30.0},
  "segment ids": {"segment_ids": (jnp.zeros((1, 16)),) * 2},
  "query positions": {"query_positions": jnp.zeros((1, 16))},
  "head widths 160 and 160": {"H": 160},
  "a bias shared along queries or keys": {"bias": jnp.zeros((1, 2, 1, 16))},
}


def refusal(T=16, H=64, dtype=jnp.bfloat16, return_lse=False, **options):
  q, k = (jnp.zeros((1, length, 2, H), dtype) for length in (T, 16))
  options = CAUSAL | {"query_positions": None} | options
  return cudnn.refusal(q, k, k, return_lse=return_lse, **options)


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_name_the_reason(reason):
  assert refusal(**REFUSED[reason]).startswith(reason)


@pytest.mark.parametrize("mask", [Full(), Causal(), SlidingWindow(5, 0)])
def test_bands_are_not_refused(mask):
  assert refusal(mask=mask, bias=jnp.zeros((1, 2, 16, 16))) is None
