"""What the compilers' reports are read as, what is kept of them, and one target of each kind."""

import json

import jax
import pytest

from scripts.checks import grouped, kernel_table, kernels, launches, plugins, quantized, reports
from scripts.checks.alone import Case
from scripts.checks.targets import TARGETS

NO_TOOLS = reports.Tools(None, None)


def test_a_case_is_its_name_and_others_are_refused():
  for name in ("bfloat16-128-causal", "float32-64-bigbird-1"):
    assert str(Case.of(name)) == name
  assert Case.of("bfloat16-64-full-2") == Case.of("bfloat16-64-full")
  for name in ("float16-64-causal", "bfloat16-wide-causal", "bfloat16-64-checkered", ""):
    with pytest.raises(ValueError, match="allowed"):
      Case.of(name)


def test_jobs_are_every_mask_width_type_and_grouping():
  for target in TARGETS:
    jobs = kernels.jobs(target)
    assert len(set(jobs)) == len(jobs)
    combinations = {job.split("/")[0] for job in jobs if job.endswith("/keys")}
    assert len(combinations) == 2 * 3 * 2 * len(kernels.MASKS) + 1
    assert ("bfloat16-128-causal/decode" in jobs) == (TARGETS[target].platform == "gpu")


def test_products_with_packed_matrices_take_their_arguments():
  for name in quantized.CASES:
    case = quantized.Case.of(name)
    assert str(case) == name
    x, codes, constants = case.arguments("inputs")
    outputs = jax.eval_shape(quantized.program(case, "outputs", "tpu"), *case.arguments("outputs"))
    assert (case.rows, case.outputs) == x.shape == outputs.shape
    assert codes.shape[0] == case.outputs and all(c.shape[0] == case.outputs for c in constants)


def test_products_of_groups_take_their_arguments_and_are_exact_where_interpreted():
  for name in grouped.CASES:
    case = grouped.Case.of(name)
    assert str(case) == name and set(case.products) <= set(grouped.PRODUCTS)
  for name in grouped.SMALL[:2]:
    case = grouped.Case.of(name)
    assert all(grouped.values(case, product, True)["good"] for product in case.products)
  given = [case.arguments(product) for product in case.products]
  x, (codes, *_), sizes = given[0]
  assert (x.shape, codes.shape[0]) == ((case.rows, case.width), *sizes.shape)


def test_shared_memory_is_read_for_the_kernel_asked_for(tmp_path):
  launch = (
    "{}: kCustomKernel [source | sink] {} grid: [8, 1, 1] threads: [9, 1, 1]  shared_memory: "
  )
  lines = launch.format(1, "wrapped_iota") + "0 bytes\n" + launch.format(2, "forward") + "512 bytes"
  (tmp_path / "a.thunk_sequence.txt").write_text(lines)
  assert reports.gpu(tmp_path, "forward", NO_TOOLS, "sm_90a") == ({"shared": 512}, "")
  with pytest.raises(ValueError, match="'keys'"):
    reports.gpu(tmp_path, "keys", NO_TOOLS, "sm_90a")


def test_launches_are_counted_wherever_they_are(tmp_path):
  (tmp_path / "a.thunk_sequence.txt").write_text(
    "000: kCommandBuffer [source | sink] \n"
    "    001: kCustomKernel [source | next=002 (1)] forward grid: [32, 8, 1]\n"
    "    002: kCopy [prev=001 (1) | sink]\n"
    "003: kWhile [source | sink]\n"
    "    004: kGemm [source | sink] k of no line's beginning: kKernel\n"
  )
  assert reports.launches(tmp_path) == 3


def test_programs_that_are_counted_take_their_arguments():
  assert launches.programs(Case.of("float32-128-causal")) == ()
  case = Case.of("bfloat16-128-causal")
  assert launches.programs(case) == ("attend", "gradients", "decode")
  query, key, *_, cotangent = launches.arguments(case, "gradients")
  assert query.shape == cotangent.shape and query.shape[2] == case.group * key.shape[2]
  query, key, value, at = launches.arguments(case, "decode")
  assert (query.shape[:2], at.shape) == ((8, 1), (8, 1)) and key.shape == value.shape


def test_the_shares_of_bundles_with_a_matrix_operation_and_with_a_spill(tmp_path):
  schedule = (
    "== CAPACITY:\nMXU, VSTORE, VSTORE:SPILL\n 4 1 1\n"
    "== UTILIZATION:\n 2 0 0\n 0 1 1\n 1 1 0\n 0 0 0\n"
  )
  for name in ("transpose_jvp_keys__.1", "iota.refs_3___keys__"):
    path = tmp_path / f"1-{name}-00-final_hlo-static-per-bundle-utilization.txt"
    path.write_text(schedule)
  pieces = [{"size": 10, "tag": "scratch operand"}, {"size": 6, "tag": "SPILL"}]
  block = {"block_type": "SCOPED", "block_size": 16, "allocations": pieces}
  data = {"hlo_breakdowns": {"copy": {"blocks": []}, "transpose_jvp_keys__.1": {"blocks": [block]}}}
  (tmp_path / "1-vmem_report.html").write_text(f"const DATA = {json.dumps(data)};")
  want = {"bundles": 4, "matmul": 0.5, "spilling": 0.25, "vmem": 16, "spill": 6}
  assert reports.tpu(tmp_path, "keys") == want


def test_runs_are_kept_and_compared_by_the_worst_of_all_masks(tmp_path, monkeypatch):
  monkeypatch.setattr(kernel_table, "FOLDER", tmp_path)
  row = lambda mask, **figures: {
    "target": "h100",
    "case": f"bfloat16-64-{mask}",
    "kernel": "forward",
    "tile": "64×128",
    "registers": 99,
    **figures,
  }
  old = [row("full", rest=700, wait=0, seconds=1.0), row("causal", rest=900, wait=1)]
  kernel_table.save("before", "h100", old[:1])
  kernel_table.save("before", "h100", old)
  (path,) = tmp_path.glob("before/*.json")
  path.write_text(path.read_text().replace('"date": "', '"date": "1'))
  kernel_table.save("after", "h100", [row("full", rest=600, wait=2), row("causal", rest=400)])
  assert kernel_table.runs("h100") == ["before", "after"]
  assert [each["rest"] for each in kernel_table.saved("before", "h100")] == [700, 900]
  assert "seconds" not in path.read_text()
  kernel_table.write(["h100"])
  text = (tmp_path / "table.md").read_text()
  assert "| forward | bfloat16 | 64 | 64×128 | 0 | 99 | – | 0 → 2 | 700 → 600 |" in text


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
  "target, job, figures",
  [
    ("h100", "bfloat16-64-causal/forward", {"shared", "busy 4k"}),
    ("h100", "bfloat16-128-causal/decode", {"launches"}),
    ("v5e", "bfloat16-128-full/forward", {"bundles", "matmul", "vmem", "pair"}),
    ("h100", "bfloat16-576-nf4-1536-16/outputs", {"shared"}),
    ("v5e", "bfloat16-576-int8-1536-16/inputs", {"bundles", "matmul"}),
  ],
)
def test_a_target_of_each_kind_compiles(target, job, figures):
  try:
    plugins.install()
  except RuntimeError as error:
    pytest.skip(f"no compilers for accelerators: {error}")
  (row,) = kernels.check({target: [job]})
  assert "error" not in row
  assert all(row[name] > 0 for name in figures)
  assert row.get("shared", 0) <= 232448 and row.get("vmem", 0) <= 16 * 2**20
