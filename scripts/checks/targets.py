"""Accelerators that programs are compiled for on a machine that has none."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from effjax.kernels.flash_attention.fused.jobs import Job
from effjax.kernels.flash_attention.fused.sizes import Size
from scripts.checks import reports, sass

_GPU = """
platform_name: "CUDA" device_description_str: "{name}" dnn_version_info {{ major: 9 minor: 8 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared}
  shared_memory_per_core: {shared_of_core} l2_cache_size: {cache}
  memory_bandwidth: {bandwidth} device_memory_size: 85000000000
}}"""


@dataclasses.dataclass(frozen=True)
class GPU:
  """An NVIDIA GPU; sizes in bytes, per second for the bandwidth.

  Attributes:
    architecture: what ptxas calls it.
    units: float32 units of a multiprocessor.
    shared: shared memory that one block may have.
  """

  name: str
  major: int
  minor: int
  architecture: str
  cores: int
  units: int
  clock: float
  shared: int
  shared_of_core: int
  cache: int
  bandwidth: int

  platform = "gpu"

  def environment(self, dump: str) -> dict[str, str]:
    """What must be set before jax is imported; the compiler's reports go to `dump`."""
    # "ptx" keeps what every pass of Triton leaves behind, tens of megabytes, out of the dump.
    flags = f"--xla_gpu_autotune_level=0 --xla_dump_to={dump} --xla_dump_emitter_re=ptx"
    return {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "XLA_FLAGS": flags}

  def compile(self, function: Any, arguments: Any) -> None:
    """Compiles for shapes and types; errors are those of the compiler."""
    config = _GPU.format(**dataclasses.asdict(self))
    described = topologies.get_topology_desc(
      platform="cuda", topology_name="one", target_config=config, topology="1x1x1"
    )
    mesh = Mesh(np.array(described.devices), ("x",), axis_types=(AxisType.Explicit,))
    shapes = _placed(arguments, NamedSharding(mesh, P()))
    traced = jax.jit(function).trace(*shapes)
    with jax.sharding.use_abstract_mesh(self._abstract(mesh)):
      traced.lower(lowering_platforms=("cuda",)).compile()

  def report(
    self, dump: pathlib.Path, kernel: str, job: Job, size: Size, tools: reports.Tools
  ) -> reports.Figures:
    """What the compiler, and NVIDIA's tools where they are given, say of a kernel."""
    figures, code = reports.gpu(dump, kernel, tools, self.architecture)
    return figures | sass.figures(code, kernel, job, size)

  def _abstract(self, mesh: Mesh) -> AbstractMesh:
    """The mesh; from jax 0.11 on it says for what device kernels are lowered."""
    abstract = mesh.abstract_mesh
    kind = getattr(jax.sharding, "AbstractDevice", None)
    if kind is None:
      return abstract
    device = kind(device_kind=self.name, num_cores=self.cores, platform="gpu")
    return AbstractMesh(
      abstract.axis_sizes, abstract.axis_names, abstract.axis_types, abstract_device=device
    )


@dataclasses.dataclass(frozen=True)
class TPU:
  """A TPU: what jax calls it, a host's topology, and what libtpu calls the kind of machine."""

  name: str
  topology: str
  kind: str

  platform = "tpu"

  def environment(self, dump: str) -> dict[str, str]:
    """What must be set before jax is imported; the compiler's reports go to `dump`."""
    flags = (
      f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
      "--xla_jf_dump_llo_pass_label_regex=final_hlo-static-per-bundle-utilization"
    )
    machine = {"TPU_ACCELERATOR_TYPE": self.kind, "TPU_WORKER_HOSTNAMES": "localhost"}
    # There is no TPU for processes to quarrel over.
    alone = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return machine | alone | {"LIBTPU_INIT_ARGS": flags}

  def compile(self, function: Any, arguments: Any) -> None:
    """Compiles for shapes and types; errors are those of the compiler."""
    described = topologies.get_topology_desc(platform="tpu", topology_name=self.topology)
    shapes = _placed(arguments, SingleDeviceSharding(described.devices[0]))
    jax.jit(function).lower(*shapes).compile()

  def report(
    self, dump: pathlib.Path, kernel: str, job: Job, size: Size, tools: reports.Tools
  ) -> reports.Figures:
    """What the compiler says of a kernel."""
    figures = reports.tpu(dump, kernel)
    pair = figures["bundles"] * 512 * 512 / (size.queries * size.keys)
    return figures | {"pair": round(pair)}


TARGETS: dict[str, GPU | TPU] = {
  "h100": GPU(
    "NVIDIA H100 80GB HBM3", 9, 0, "sm_90a", 132, 128, 1.98, 232448, 233472, 52428800, 3352320000000
  ),
  "a100": GPU(
    "NVIDIA A100-SXM4-80GB", 8, 0, "sm_80", 108, 64, 1.41, 166912, 167936, 41943040, 2039000000000
  ),
  "v5e": TPU("TPU v5 lite", "v5e:2x2", "v5litepod-4"),
  "v6e": TPU("TPU v6 lite", "v6e:2x2", "v6e-4"),
}


@contextlib.contextmanager
def present(device: GPU | TPU) -> Iterator[None]:
  """What picks by the default device, picks as if it were this one."""
  devices = mock.patch.object(jax, "devices", lambda: [SimpleNamespace(device_kind=device.name)])
  backend = mock.patch.object(jax, "default_backend", lambda: device.platform)
  with devices, backend:
    yield


def environment(target: str, dump: str, plugins: pathlib.Path) -> dict[str, str]:
  """The whole environment of a process that compiles for a target with the plugins of a folder."""
  path = [str(plugins), os.environ.get("PYTHONPATH", "")]
  own = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, path))}
  return os.environ | own | TARGETS[target].environment(dump)


def _placed(arguments: Any, sharding: Any) -> Any:
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(place, arguments)
