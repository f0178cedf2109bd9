"""What the compilers' reports are read as, what counts as a fault, and one target of each kind."""

import json

import pytest

from scripts.checks import kernels, plugins, reports
from scripts.checks.alone import Case


def test_a_case_is_its_name_and_others_are_refused():
  assert str(Case.of("bfloat16-128-causal")) == "bfloat16-128-causal"
  for name in ("float16-64-causal", "bfloat16-wide-causal", "bfloat16-64-checkered", ""):
    with pytest.raises(ValueError, match="allowed"):
      Case.of(name)


@pytest.mark.parametrize(
  "changes, wrong",
  [
    ({}, None),
    ({"spill": 8}, "spills 8 bytes"),
    ({"spill": 8, "target": "a100"}, None),
    ({"error": "no registers left"}, "no registers left"),
    ({"target": "v5e", "case": "bfloat16-128-full", "matmul": 0.5}, "50% of the bundles"),
    ({"target": "v5e", "case": "bfloat16-128-full", "matmul": 0.6}, None),
  ],
)
def test_faults(changes, wrong):
  row = {"target": "h100", "case": "bfloat16-64-causal", "kernel": "forward", "spill": 0} | changes
  found = kernels.fault(row)
  assert found is None if wrong is None else wrong in found


def test_shared_memory_is_read_for_the_kernel_asked_for(tmp_path):
  launch = (
    "{}: kCustomKernel [source | sink] {} grid: [8, 1, 1] threads: [9, 1, 1]  shared_memory: "
  )
  lines = launch.format(1, "wrapped_iota") + "0 bytes\n" + launch.format(2, "forward") + "512 bytes"
  (tmp_path / "a.thunk_sequence.txt").write_text(lines)
  assert reports.gpu(tmp_path, "forward", None, "sm_90a") == {"shared": 512}
  with pytest.raises(ValueError, match="'keys'"):
    reports.gpu(tmp_path, "keys", None, "sm_90a")


def test_the_share_of_bundles_with_a_matrix_operation(tmp_path):
  schedule = "== CAPACITY:\nMXU, VALU\n 4 4\n== UTILIZATION:\n 2 0\n 0 3\n 1 1\n 0 0\n"
  for name in ("transpose_jvp_keys__.1", "iota.refs_3___keys__"):
    path = tmp_path / f"1-{name}-00-final_hlo-static-per-bundle-utilization.txt"
    path.write_text(schedule)
  pieces = [{"size": 10, "tag": "scratch operand"}, {"size": 6, "tag": "SPILL"}]
  block = {"block_type": "SCOPED", "block_size": 16, "allocations": pieces}
  data = {"hlo_breakdowns": {"copy": {"blocks": []}, "transpose_jvp_keys__.1": {"blocks": [block]}}}
  (tmp_path / "1-vmem_report.html").write_text(f"const DATA = {json.dumps(data)};")
  want = {"bundles": 4, "matmul": 0.5, "vmem": 16, "spill": 6}
  assert reports.tpu(tmp_path, "keys") == want


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
  "target, case, figures",
  [
    ("h100", "bfloat16-64-causal", {"shared"}),
    ("v5e", "bfloat16-128-full", {"bundles", "matmul", "vmem"}),
  ],
)
def test_a_target_of_each_kind_compiles(target, case, figures):
  try:
    plugins.install()
  except RuntimeError as error:
    pytest.skip(f"no compilers for accelerators: {error}")
  result = kernels.check([target], [case])
  assert result["faults"] == []
  assert len(result["kernels"]) == len(Case.of(case).kernels)
  for row in result["kernels"]:
    assert all(row[name] > 0 for name in figures)
    assert row.get("shared", 0) <= 232448 and row.get("vmem", 0) <= 16 * 2**20
