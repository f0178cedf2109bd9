"""What is said to be saved is saved: signals, damage, a second process, a full disk."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.train import Checkpoints, loop
from effjax.train.checkpoint import Damaged
from effjax.train.lock import locked
from tests.train.conftest import Stream

EVALUATE = {"evaluate": lambda params: {"held_out": 1.0}, "evaluate_every": 2}


def _same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.fixture
def send_at(monkeypatch):
  """send_at(moment, count, number): the signal comes before or after the count-th such call."""

  def send_at(moment, count, number):
    where, name = moment.split(" ")
    owner = {"save": Checkpoints, "__next__": Stream}.get(name, loop)
    original, calls = getattr(owner, name), []

    def called(*arguments, **options):
      calls.append(0)
      if where == "before" and len(calls) == count:
        os.kill(os.getpid(), number)
      found = original(*arguments, **options)
      if where == "after" and len(calls) == count:
        os.kill(os.getpid(), number)
      return found

    monkeypatch.setattr(owner, name, called)

  return send_at


MOMENTS = [f"{when} {name}" for when in ("before", "after") for name in ("append_row", "__next__")]
MOMENTS += ["before save", "after save", "after _drain"]
CASES = [
  (moment, *case) for moment in MOMENTS for case in ((1, signal.SIGTERM), (3, signal.SIGINT))
]
CASES += [("after _resume", 1, signal.SIGTERM), ("after _resume", 1, signal.SIGINT)]


@pytest.mark.parametrize(("moment", "count", "number"), CASES)
def test_a_signal_at_any_moment_saves_what_it_says(
  tmp_path, run, send_at, capfd, moment, count, number
):
  whole = run(tmp_path / "a", **EVALUATE)
  send_at(moment, count, number)
  handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with pytest.raises(SystemExit) as exit:
    run(tmp_path / "b", **EVALUATE)
  assert exit.value.code == 0
  assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
  said = capfd.readouterr()
  step = int(said.out.partition(f"{signal.Signals(number).name}: step ")[2].split()[0])
  assert step == Checkpoints(tmp_path / "b" / "checkpoints").good_steps()[-1]
  assert "the step is finished and saved" in said.err
  _same(whole, run(tmp_path / "b", **EVALUATE))
  assert f"going on from step {step} of 9" in capfd.readouterr().out
  rows = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in "ab"]
  assert rows[0] == rows[1]


def test_a_signal_in_an_evaluation_saves(tmp_path, run, capsys):
  def evaluate(params):
    os.kill(os.getpid(), signal.SIGTERM)
    return {"held_out": 1.0}

  with pytest.raises(SystemExit):
    run(tmp_path, evaluate=evaluate, evaluate_every=2, checkpoint_every=5)
  assert "SIGTERM: step 2 is saved" in capsys.readouterr().out
  assert Checkpoints(tmp_path / "checkpoints").good_steps() == [2]


def test_a_signal_in_a_run_that_has_ended_ends_the_process(tmp_path, run, send_at):
  run(tmp_path)
  send_at("after _resume", 1, signal.SIGTERM)
  with pytest.raises(SystemExit):
    run(tmp_path)


def test_a_second_interrupt_interrupts_at_once(tmp_path, run):
  def evaluate(params):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("it went on")

  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, evaluate=evaluate, evaluate_every=2)


def test_a_signal_and_a_full_disk_do_not_say_that_it_is_saved(tmp_path, run, monkeypatch, capsys):
  def full(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)
    raise OSError(28, "No space left on device")

  run(tmp_path, 3)
  monkeypatch.setattr("effjax.train.checkpoint.v1.save_checkpointables", full)
  with pytest.raises(OSError, match=r"step 6 could not be written .*last good checkpoint: step 3"):
    run(tmp_path)
  assert "is saved" not in capsys.readouterr().out
  assert Checkpoints(tmp_path / "checkpoints").good_steps() == [3]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A folder of checkpoints 3 and 6 of a small tree; the tree."""
  folder = tmp_path_factory.mktemp("saved") / "checkpoints"
  tree = {"w": jnp.arange(300.0), "half": jnp.ones(5, jnp.bfloat16), "step": jnp.int32(3)}
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(3, tree, data={"row": 17})
    checkpoints.save(6, jax.tree.map(lambda x: x * 2, tree), data={"row": 34})
  return folder, tree


def _harms():
  """Name → a change of a file's bytes; None removes it."""
  flip = lambda at: lambda b: b[: at % len(b)] + bytes([b[at % len(b)] ^ 1]) + b[at % len(b) + 1 :]
  flips = {f"bit flipped at {at}": flip(at) for at in (0, 7, 40, -1, -30)}
  return flips | {"cut": lambda b: b[: len(b) // 2], "empty": lambda b: b"", "gone": lambda b: None}


@pytest.mark.parametrize("harm", _harms())
def test_damage_of_any_file_is_named_and_passed_over(tmp_path, saved, harm):
  folder, tree = saved
  paths = [path for path in (folder / "6").rglob("*") if path.is_file() and path.stat().st_size]
  names = [path.relative_to(folder / "6") for path in paths]
  assert len(names) > 5
  for number, name in enumerate(names):
    copy = tmp_path / str(number) / "checkpoints"
    shutil.copytree(folder, copy)
    content = _harms()[harm]((copy / "6" / name).read_bytes())
    (copy / "6" / name).unlink()
    if content is not None:
      (copy / "6" / name).write_bytes(content)
    with pytest.raises(Damaged, match=rf"step 6 is damaged: {name} .*good ones: \[3\]"):
      Checkpoints(copy).restore(tree, step=6)
    for opened in (Checkpoints(copy), Checkpoints(copy).__enter__()):
      with pytest.warns(UserWarning, match=rf"step 6 is damaged: {name} .*going on from step 3"):
        found = opened.restore(tree)
      assert (found.step, found.data) == (3, {"row": 17})
      _same(found.state, tree)
    opened.__exit__()
    assert opened.steps() == [3] and (copy / "6.damaged").is_dir()


def test_where_all_are_damaged_each_is_named_and_nothing_is_touched(tmp_path, saved):
  folder, tree = saved
  copy = tmp_path / "checkpoints"
  shutil.copytree(folder, copy)
  shutil.rmtree(copy / "3" / "state")
  (copy / "6" / "record.json").unlink()
  with (
    Checkpoints(copy) as checkpoints,
    pytest.raises(Damaged, match=r"step 6 .*record.json.*step 3 .*good ones: none"),
  ):
    checkpoints.restore(tree)
  assert checkpoints.steps() == [3, 6]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, run):
  whole = run(tmp_path / "a", keep=2)
  run(tmp_path / "b", 6, keep=1)
  run(tmp_path / "c", 6, keep=2)
  for name in "bc":
    shutil.rmtree(tmp_path / name / "checkpoints" / "6" / "state")
  with pytest.raises(Damaged, match="good ones: none"):
    run(tmp_path / "b", keep=1)
  with pytest.warns(UserWarning, match="going on from step 3"):
    _same(whole, run(tmp_path / "c", keep=1))
  rows = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in "ac"]
  assert rows[0] == rows[1]


def test_what_an_interrupted_save_left_is_removed_by_the_next_writer(tmp_path):
  (tmp_path / "6.unfinished" / "state").mkdir(parents=True)
  assert Checkpoints(tmp_path).steps() == [] and (tmp_path / "6.unfinished").exists()
  with Checkpoints(tmp_path):
    assert not list(tmp_path.iterdir())


def test_a_step_that_is_not_above_the_others_is_refused(saved):
  with Checkpoints(saved[0]) as checkpoints, pytest.raises(ValueError, match=r"step=6; .*above 6"):
    checkpoints.save(6, saved[1])


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path, run):
  with Checkpoints(tmp_path / "checkpoints"):
    mine = f"in use by process {os.getpid()} on .*another directory.*{tmp_path.name}"
    with pytest.raises(BlockingIOError, match=mine):
      run(tmp_path)
  assert not (tmp_path / "metrics.jsonl").exists()
  run(tmp_path, 1)


def test_the_lock_of_a_killed_process_does_not_block(tmp_path):
  path = tmp_path / "lock"
  program = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
  program += "print(1, flush=True); time.sleep(60)"
  holder = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE)
  with holder:
    holder.stdout.read(1)
    with pytest.raises(BlockingIOError, match="in use by another process"), locked(path):
      pass
    holder.kill()
    holder.wait()
    with locked(path):
      assert json.dumps(os.getpid()) in path.read_text()
