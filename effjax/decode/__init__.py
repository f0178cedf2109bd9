"""Text from models: sampling, and generation against a cache."""

from effjax.decode.cache import bucket, prefill, unrolled
from effjax.decode.generate import Generation, generate
from effjax.decode.sampling import distribution, keep_top_k, keep_top_p, sample

__all__ = [
  "Generation",
  "bucket",
  "distribution",
  "generate",
  "keep_top_k",
  "keep_top_p",
  "prefill",
  "sample",
  "unrolled",
]
