import jax
import jax.numpy as jnp
import optax
import pytest

from effjax.quant import Int8
from effjax.train.state import init_state, trained

PARAMS = {"codes": jnp.ones((4, 2), jnp.int8), "scale": jnp.ones(2), "up": jnp.ones((2, 2))}


def test_integers_do_not_train_by_default():
  chosen, rest = trained(PARAMS)
  assert chosen["codes"] is None and rest["up"] is None
  assert set(jax.tree.leaves(rest)[0].ravel().tolist()) == {1}


def test_the_optimiser_holds_no_state_of_what_does_not_train():
  state = init_state(PARAMS, optax.adam(1e-3), trainable="scale")
  assert [x.shape for x in jax.tree.leaves(state.opt_state[0].mu)] == [(2,)]


@pytest.mark.parametrize("pattern, words", [("codes", "integers"), ("nothing", "matches no")])
def test_a_choice_that_cannot_train_is_refused(pattern, words):
  with pytest.raises(ValueError, match=words):
    init_state(PARAMS, optax.adam(1e-3), trainable=pattern)


def test_a_tree_in_which_nothing_trains_is_refused():
  with pytest.raises(ValueError, match="nothing in it trains"):
    init_state({"w": Int8.quantize(jnp.ones((2, 3)))}, optax.adam(1e-3))


def test_a_state_knows_what_trains_and_prints_in_a_line():
  state = init_state(PARAMS, optax.adam(1e-3), trainable="up")
  assert [x is None for x in state.partition()[0].values()] == [True, True, False]
  assert repr(state) == "TrainState(step 0, 3 arrays of parameters, 1 of them train)"
