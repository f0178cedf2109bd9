import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core import linear
from effjax.parallel import Zero, make_mesh, place
from effjax.peft import lora
from effjax.train import LoopConfig, fit, init_state, make_train_step


def _rows(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


def test_rows_hold_step_and_loss(tmp_path, run):
  run(tmp_path, 4)
  rows = _rows(tmp_path)
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  assert all({"loss", "grad_norm", "nll", "weight"} <= row.keys() for row in rows)


class _Killed(BaseException):
  pass


def test_killed_between_checkpoints_and_resumed_is_the_same_run(tmp_path, run, stream):
  class Mortal(stream):
    def __next__(self):
      if self.index == 7:
        raise _Killed
      return super().__next__()

  whole = run(tmp_path / "a")
  with pytest.raises(_Killed):
    run(tmp_path / "b", batches=Mortal())
  with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
    file.write('{"step": 8, "lo')
  assert _rows_until_torn(tmp_path / "b") == 7
  resumed = run(tmp_path / "b")
  _same(whole, resumed)
  read = lambda name: (tmp_path / name / "metrics.jsonl").read_bytes()
  assert read("a") == read("b")


def _rows_until_torn(workdir):
  return len((workdir / "metrics.jsonl").read_text().splitlines()) - 1


def test_a_finished_run_is_not_repeated(tmp_path, run, stream):
  class Never(stream):
    def __next__(self):
      raise AssertionError("a step was taken")

  first = run(tmp_path)
  before = (tmp_path / "metrics.jsonl").read_bytes()
  _same(first, run(tmp_path, batches=Never()))
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_sigterm_saves_and_exits_with_status_0(tmp_path, run, stream, capsys):
  class Terminated(stream):
    def __next__(self):
      if self.index == 3:
        os.kill(os.getpid(), signal.SIGTERM)
      return super().__next__()

  handler = signal.getsignal(signal.SIGTERM)
  with pytest.raises(SystemExit) as exit:
    run(tmp_path / "b", batches=Terminated(), log_every=2)
  assert exit.value.code == 0 and "step 4 is saved" in capsys.readouterr().out
  assert signal.getsignal(signal.SIGTERM) == handler
  assert sorted(int(p.name) for p in (tmp_path / "b" / "checkpoints").iterdir()) == [3, 4]
  _same(run(tmp_path / "a", log_every=2), run(tmp_path / "b", log_every=2))
  assert _rows(tmp_path / "a") == _rows(tmp_path / "b")


@pytest.mark.parametrize("log_every", [1, 5])
def test_nan_in_the_data_stops_and_leaves_the_last_good_checkpoint(
  tmp_path, run, stream, log_every
):
  with pytest.raises(
    FloatingPointError, match=r"step 5: loss is nan.*last good checkpoint: step 3"
  ):
    run(tmp_path, batches=stream(poison=5), log_every=log_every)
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]
  run(tmp_path, log_every=log_every)
  assert _rows(tmp_path)[-1]["step"] == 9


def test_evaluation_and_logging_at_their_steps(tmp_path, run):
  evaluate = lambda params: {"held_out": 1.5}
  run(tmp_path, 7, log_every=4, evaluate=evaluate, evaluate_every=3)
  assert [(row["step"], "held_out" in row) for row in _rows(tmp_path)] == [
    (3, True), (4, False), (6, True), (7, True),
  ]  # fmt: skip


def test_tensorboard_says_what_to_install(tmp_path, run):
  try:
    import tensorboardX  # noqa: F401
  except ModuleNotFoundError:
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'effjax\[tensorboard\]'"):
      run(tmp_path, 1, tensorboard=True)
  else:
    run(tmp_path, 1, tensorboard=True)
    assert list((tmp_path / "tensorboard").iterdir())


def test_another_model_in_the_workdir_is_refused(tmp_path, run, bigram, bigram_step, stream, key):
  run(tmp_path, 1)
  optimizer, step = bigram_step(width=4)
  params = jax.tree.map(jnp.array, bigram(width=4)[1])
  with pytest.raises(ValueError, match="in the checkpoint and"):
    fit(
      step, init_state(params, optimizer), stream(), key,
      workdir=tmp_path, config=LoopConfig(steps=2, progress=False),
    )  # fmt: skip


def test_a_run_goes_on_in_another_placement(tmp_path, run, bigram, stream, key):
  whole = run(tmp_path / "a")
  run(tmp_path / "b", 6)
  _, params, objective = bigram()
  optimizer, placement = optax.adam(0.03), Zero(make_mesh(data=8), 3)
  step = make_train_step(objective, optimizer, placement=placement)
  state = place(init_state(params, optimizer), placement.mesh, zero=3)
  arguments = {"workdir": tmp_path / "b", "config": LoopConfig(steps=9, progress=False)}
  state = fit(step, state, stream(), key, placement=placement, **arguments)
  for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_a_run_with_adapters_keeps_what_trains(tmp_path, stream, key):
  def objective(params, batch, rng):
    logits = linear(jax.nn.one_hot(batch["tokens"], 11), params["kernel"], params["bias"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return losses.mean(), {}

  optimizer = optax.adam(0.03)
  step = make_train_step(objective, optimizer)

  def run(name, steps, start=0.0):
    base = {"kernel": jnp.full((11, 11), start), "bias": jnp.zeros(11)}
    state = init_state(lora.add(base, jax.random.key(0), rank=2, targets="kernel"), optimizer)
    config = LoopConfig(steps=steps, progress=False)
    return fit(step, state, stream(), key, workdir=tmp_path / name, config=config)

  whole = run("a", 4)
  run("b", 2)
  _same(whole, run("b", 4))
  record = json.loads((tmp_path / "b/checkpoints/4/record.json").read_text().splitlines()[0])
  kept = {path for path in record["arrays"] if path.startswith("params")}
  assert kept == {"params/kernel/a", "params/kernel/b"}
  with pytest.raises(ValueError, match="was trained over another base: params/kernel/base is"):
    run("b", 5, start=1.0)


def test_wrong_numbers_are_named():
  with pytest.raises(ValueError, match="checkpoint_every=0"):
    LoopConfig(checkpoint_every=0)


def test_data_can_follow_from_losses_and_resumes_the_same(tmp_path, run, stream):
  class Feedback(stream):
    seen = ()

    def observe(self, row):
      self.seen = (*self.seen, round(row["loss"], 6))
      self.index += int(1e6 * row["loss"]) % 3  # which batch is next follows from the loss

    def get_state(self):
      return super().get_state() | {"seen": self.seen}

    def set_state(self, state):
      super().set_state(state)
      self.seen = tuple(state["seen"])

  whole, parts = Feedback(), Feedback()
  expected = run(tmp_path / "a", 9, batches=whole, log_every=5)
  run(tmp_path / "b", 3, batches=Feedback(), log_every=5)
  found = run(tmp_path / "b", 9, batches=parts, log_every=5)
  assert len(whole.seen) == 9 and parts.seen == whole.seen
  assert parts.index == whole.index > 9
  _same(expected.params, found.params)


def test_a_row_holds_vectors_too(tmp_path, run, stream, key):
  def objective(params, batch, rng):
    return params["w"].sum(), {"layers/load": jnp.arange(3.0)}

  optimizer = optax.sgd(0.1)
  step, state = make_train_step(objective, optimizer), init_state({"w": jnp.ones(2)}, optimizer)
  config = LoopConfig(steps=2, progress=False)
  fit(step, state, stream(), key, workdir=tmp_path, config=config)
  assert _rows(tmp_path)[1]["layers/load"] == [0.0, 1.0, 2.0]
