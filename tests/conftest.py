"""Eight simulated devices, strict rank promotion, and run-time checks of every shape annotation."""

import os

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook("effjax", "beartype.beartype").__enter__()
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key():
  """A fixed PRNG key."""
  return jax.random.key(0)
