import jax
import pytest

from effjax.parallel import make_mesh


@pytest.mark.parametrize(
  "axes, sizes",
  [
    ({"data": 8}, {"data": 8}),
    ({"data": 4, "tensor": 2}, {"data": 4, "tensor": 2}),
    ({"data": -1, "tensor": 4}, {"data": 2, "tensor": 4}),
    ({"data": 2}, {"data": 2}),
  ],
)
def test_sizes(axes, sizes):
  mesh = make_mesh(**axes)
  assert dict(mesh.shape) == sizes
  assert [d.id for d in mesh.devices.ravel()] == list(range(mesh.size))


@pytest.mark.parametrize("axes", [{"data": 3}, {"data": 16}, {"data": 4, "tensor": 3}])
def test_a_mesh_that_does_not_divide_is_refused(axes):
  with pytest.raises(ValueError, match=r"make_mesh: axes .*there are 8"):
    make_mesh(**axes)


@pytest.mark.parametrize("axes", [{}, {"data": 0}, {"data": -1, "tensor": -1}])
def test_sizes_that_mean_nothing_are_refused(axes):
  with pytest.raises(ValueError, match="allowed: sizes from 1"):
    make_mesh(**axes)


def test_chosen_devices():
  assert make_mesh(devices=jax.devices()[4:6], data=2).devices[0].id == 4
