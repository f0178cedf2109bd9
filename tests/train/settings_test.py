"""Checkpoints of other settings are not taken for the result of these."""

import json

import jax
import pytest

from effjax.parallel import Zero, make_mesh
from effjax.train import LoopConfig, fit, init_state
from tests.train.conftest import Stream, make_bigram, make_step

OTHERS = {
  "learning rate": (
    {"how": {"learning_rate": 0.01}},
    r"other settings: .* computes with \['-?0.03'\] there and",
  ),
  "optimiser": ({"how": {"adam": False}}, "opt_state/.* in the checkpoint and None here"),
  "objective": ({"how": {"coefficient": 0.3}}, "other settings: the step .* is another"),
  "microbatches": ({"how": {"microbatches": 2}}, "other settings: the step .* is another"),
  "rng": ({"rng": jax.random.key(7)}, r"rng is \[0, 0\] there and \[0, 7\] here"),
  "start": ({"scale": 1.001}, "starts from another params/embed/embedding"),
}


@pytest.mark.parametrize("steps", [6, 9])
@pytest.mark.parametrize("name", OTHERS)
def test_other_settings_are_refused_and_named(tmp_path, run, name, steps):
  changed, words = OTHERS[name]
  run(tmp_path, 6)
  before = (tmp_path / "metrics.jsonl").read_bytes()
  with pytest.raises(ValueError, match=words):
    run(tmp_path, steps, **changed)
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_fewer_steps_than_were_taken_are_refused(tmp_path, run):
  run(tmp_path, 6)
  with pytest.raises(ValueError, match=r"steps=3; .* has taken 6; allowed: from 6"):
    run(tmp_path, 3)


def test_a_finished_run_says_that_it_is(tmp_path, run, capsys):
  run(tmp_path, 3)
  assert "going on" not in capsys.readouterr().out
  run(tmp_path, 3)
  assert "going on from step 3 of 3 in" in capsys.readouterr().out


def test_more_steps_and_other_rhythms_go_on(tmp_path, run):
  run(tmp_path, 3)
  run(tmp_path, 7, log_every=2, checkpoint_every=2, evaluate_every=5)
  assert json.loads((tmp_path / "metrics.jsonl").read_text().split("\n")[-2])["step"] == 7


def test_without_the_file_a_run_goes_on_all_the_same(tmp_path, run):
  run(tmp_path, 3)
  (tmp_path / "settings.json").unlink()
  run(tmp_path, 6, how={"learning_rate": 0.01})
  with pytest.raises(ValueError, match="other settings"):
    run(tmp_path, 6)


def test_a_run_without_checkpoints_may_be_begun_otherwise(tmp_path, run):
  class Broken(Stream):
    def __next__(self):
      if self.index:
        raise RuntimeError
      return super().__next__()

  with pytest.raises(RuntimeError):
    run(tmp_path, batches=Broken())
  run(tmp_path, how={"learning_rate": 0.01})


def test_a_damaged_file_is_named(tmp_path, run):
  run(tmp_path, 3)
  (tmp_path / "settings.json").write_text('{"rng":')
  with pytest.raises(ValueError, match=r"settings\.json is damaged, it is not JSON"):
    run(tmp_path, 6)


def test_another_placement_is_said_and_the_rest_is_compared(tmp_path, run, key, capsys):
  run(tmp_path, 3)
  placement = Zero(make_mesh(data=1), 0)
  optimizer, step = make_step(0.01)
  config = LoopConfig(steps=3, progress=False)
  state = init_state(jax.tree.map(jax.numpy.array, make_bigram()[1]), optimizer)
  fit(step, state, Stream(), key, workdir=tmp_path, config=config, placement=placement)
  said = "placement changed since settings.json was written: the step is not compared"
  assert said in capsys.readouterr().out
