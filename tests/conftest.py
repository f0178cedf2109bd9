"""Eight simulated devices, strict rank promotion, and run-time checks of every shape annotation."""

import os
import pathlib

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("PJRT_NPROC", "64")  # as in effjax.parallel.simulate_devices
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook("effjax", "beartype.beartype").__enter__()
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is most of the time of the tests; programs seen before are read back.
cache = pathlib.Path(__file__).parent.parent / ".pytest_cache" / f"jax-{jax.__version__}"
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture
def key():
  """A fixed PRNG key."""
  return jax.random.key(0)
