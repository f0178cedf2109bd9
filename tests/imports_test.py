"""Imports go one way; read from the source, so that an import inside a function counts too."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What a room may import besides itself. Technique rooms share core, layers and kernels, and do not
# know one another; cost and decode work on any model's description, and models is above them all.
BASE = {"core", "kernels", "layers"}
TECHNIQUES = ("attention", "moe", "ssm", "peft", "quant", "compress", "prune", "distill")
ALLOWED = {
  "core": set(),
  "kernels": {"core"},
  "layers": {"core", "kernels"},
  **dict.fromkeys(TECHNIQUES, BASE),
  "parallel": {"core", "layers"},
  "data": {"core"},
  "cost": BASE,
  "decode": BASE,
  "models": BASE | {*TECHNIQUES, "data", "parallel"},
  "train": BASE | {*TECHNIQUES, "data", "parallel", "models", "cost", "decode"},
  "interop": BASE | {"models"},
}
NO_FLAX = {"core", "kernels"}


def rooms() -> dict[str, list[Path]]:
  """The source files of every room."""
  folders = [path for path in (ROOT / "effjax").iterdir() if path.is_dir()]
  found = {folder.name: sorted(folder.rglob("*.py")) for folder in folders}
  found["kernels"] = sorted((ROOT / "kernels").rglob("*.py"))
  return {room: files for room, files in found.items() if files}


def statements(path: Path) -> set[tuple[str, str]]:
  """What a file imports: ("a", "a.b") for `from a import b`, ("a", "a") for `import a`."""
  pairs = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      pairs |= {(alias.name, alias.name) for alias in node.names}
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path} line {node.lineno}: a relative import"
      pairs |= {(node.module, f"{node.module}.{alias.name}") for alias in node.names}
  return pairs


def imported(path: Path) -> set[str]:
  """Every module name that a file imports, `from a import b` giving a and a.b."""
  return {name for pair in statements(path) for name in pair}


def modules() -> dict[str, Path]:
  """The file of every module of the library."""
  found = {}
  for top, folder in (("effjax", ROOT / "effjax"), ("effjax.kernels", ROOT / "kernels")):
    for path in folder.rglob("*.py"):
      parts = path.relative_to(folder).with_suffix("").parts
      found[".".join((top, *parts)).removesuffix(".__init__")] = path
  return found


def test_every_room_has_a_place():
  assert set(rooms()) <= set(ALLOWED)
  assert {"core", "kernels", "layers", "attention", "models"} <= set(rooms())


@pytest.mark.parametrize("room", sorted(rooms()))
def test_a_room_imports_only_what_is_below_it(room):
  allowed = ALLOWED[room] | {room}
  for path in rooms()[room]:
    used = {name.split(".")[1] for name in imported(path) if name.startswith("effjax.")}
    wrong = used & set(rooms()) - allowed
    assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}; allowed {sorted(allowed)}"


@pytest.mark.parametrize("room", sorted(rooms()))
def test_the_library_imports_neither_experiments_nor_tests(room):
  for path in rooms()[room]:
    tops = {name.partition(".")[0] for name in imported(path)}
    wrong = tops & {"experiments", "scripts", "tests", "torch", "transformers", "peft", "pickle"}
    assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("room", sorted(NO_FLAX))
def test_there_is_no_flax_below_layers(room):
  for path in rooms()[room]:
    assert not any(name.partition(".")[0] == "flax" for name in imported(path)), path


def test_rooms_may_not_import_one_another_in_a_circle():
  assert next(graphlib.TopologicalSorter(ALLOWED).static_order()) == "core"


def test_modules_do_not_import_one_another_in_a_circle():
  files = modules()
  needs = {
    name: {whole if whole in files else module for module, whole in statements(path)}
    for name, path in files.items()
  }
  order = [*graphlib.TopologicalSorter(needs).static_order()]  # or CycleError, which names them
  assert set(files) <= set(order)


@pytest.mark.parametrize("folder, other", [("tiled", "fused"), ("fused", "tiled")])
def test_an_implementation_of_attention_does_not_need_the_other(folder, other):
  """But for the gradients of what scores hold, which the frame of the kernels takes from tiles."""
  attention = "effjax.kernels.flash_attention"
  for path in sorted((ROOT / "kernels/flash_attention" / folder).rglob("*.py")):
    wrong = {name for name in imported(path) if name.startswith(f"{attention}.{other}")}
    if path.name == "frame.py":
      wrong -= {f"{attention}.tiled", f"{attention}.tiled.xla"}
    assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"
