"""Eight simulated devices, strict rank promotion, and run-time checks of every shape annotation."""

import gc
import os
import pathlib
from importlib.metadata import version

# Compiling is most of the time of the tests: LLVM takes half of it when it optimises little, and
# XLA's older emitters, where there are any, a third. Processes that the tests start inherit both.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  + " --xla_cpu_use_fusion_emitters=false" * version("jax").startswith("0.10.")
)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("PJRT_NPROC", "64")  # as in effjax.parallel.simulate_devices
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook("effjax", "beartype.beartype").__enter__()
jax.config.update("jax_numpy_rank_promotion", "raise")
# Programs seen before are read back.
cache = pathlib.Path(__file__).parent.parent / ".pytest_cache" / f"jax-{jax.__version__}"
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")


def pytest_collection_finish():
  """What is imported stays: the collector of garbage need not look at it again and again."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000)


def pytest_collection_modifyitems(items):
  """Slow tests come first, so that no worker has a long one left when the others have ended."""
  items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_teardown(item, nextitem):
  """Programs are let go in time: Linux gives a process 65,530 mappings, and each takes several.

  The process dies where there are no more.
  """
  maps = pathlib.Path("/proc/self/maps")
  ends = nextitem is not None and nextitem.fspath != item.fspath
  if ends and maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
    jax.clear_caches()


@pytest.fixture
def key():
  """A fixed PRNG key."""
  return jax.random.key(0)


@pytest.fixture
def optimized(monkeypatch):
  """What the test compiles first is optimised as for use: for tests of the compiler's results."""
  option = "jax_disable_most_optimizations"
  monkeypatch.setenv(option.upper(), "0")
  before = jax.config.values[option]
  jax.config.update(option, False)
  yield
  jax.config.update(option, before)
