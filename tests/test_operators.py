import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from ncsn_diffusers import operators
from ncsn_diffusers.operators import LinearOperator

SHAPE = (3, 2, 8, 8)


class Objects:
    """An operator with A and A_adjoint, from functions."""

    def __init__(self, forward, adjoint):
        self.A, self.A_adjoint = forward, adjoint


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MATRIX = random((20, 128), 1) / 128**0.5
MASK = random((8, 8), 2) > 0
KERNEL = torch.tensor([[0.05, 0.1, 0.0], [0.2, 0.4, 0.1], [0.0, 0.1, 0.05]])


def blur(x):
    return F.conv2d(x, KERNEL.expand(2, 1, 3, 3), padding=1, groups=2)


# by name: the operator, and the way in which its solve is done
OPERATORS = {
    "matrix": (MATRIX, "_spectral_solver"),
    "tall matrix": (random((150, 128), 3), "_spectral_solver"),
    "complex matrix": (torch.complex(MATRIX, random((20, 128), 4) / 128**0.5), "_spectral_solver"),
    "array in float64": (MATRIX.double().numpy(), "_spectral_solver"),
    "averages": (lambda x: F.avg_pool2d(x, 4), "_diagonal_solver"),
    "mask": (lambda x: x * MASK, "_diagonal_solver"),
    "selected pixels": (lambda x: x[..., MASK], "_diagonal_solver"),
    "a mask for each image": (lambda x: x * (random(SHAPE, 5) > 0), "_diagonal_solver"),
    "weights": (Objects(lambda x: x * MASK * 3, lambda y: y * MASK * 3), "_diagonal_solver"),
    "blur": (blur, "_spectral_solver"),
    "Fourier": (lambda x: torch.fft.fft2(x)[..., ::2, :], "_spectral_solver"),
    "a filter for each image": (lambda x: x + random((3, 1, 1, 1), 6) * x.roll(1, -1), "_solve_by_gradients"),
}


def dense(operator):
    """Its matrix for each image, (batch_size, m, n), in float64, column by column."""
    pixels = math.prod(SHAPE[1:])
    columns = [operator.A(unit.reshape(1, *SHAPE[1:]).expand(SHAPE)).flatten(1) for unit in torch.eye(pixels)]
    return torch.stack(columns, -1).double()


def solver_name(operator):
    return operator._solve.__qualname__.split(".")[1]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("c", "variance"), [(1.0, 0.3), (100.0, 0.0025), (1e-4, 0.0025)])
def test_adjoint_and_solve_are_those_of_the_matrix(name, c, variance):
    given, way = OPERATORS[name]
    operator = LinearOperator(given, SHAPE)
    assert solver_name(operator) == way
    matrix, x = dense(operator), random(SHAPE, 7)
    r = operator.A(random(SHAPE, 8)) + 0.1 * operator.A(random(SHAPE, 9))
    assert operator.measurement_shape == r.shape
    expected_adjoint = (matrix.mT @ r.flatten(1).double()[..., None]).reshape(SHAPE)
    torch.testing.assert_close(operator.A_adjoint(r).double(), expected_adjoint, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        operator.A(x).flatten(1).double(), (matrix @ x.flatten(1).double()[..., None])[..., 0], rtol=1e-4, atol=1e-4
    )
    if way == "_solve_by_gradients":
        variance = max(variance, c * operator.norm**2 / operators.CG_CONDITION)
    system = variance * torch.eye(matrix.shape[1], dtype=torch.float64) + c * matrix @ matrix.mT
    z = torch.linalg.solve(system, r.flatten(1).double()[..., None])
    u = c * (matrix.mT @ z)[..., 0]
    found_z, found_u = operator.solve(r, c, variance)
    assert found_z.shape == r.shape
    error = (found_u.flatten(1) - u).norm(dim=1) / u.norm(dim=1)
    assert error.max() < (0.01 if way == "_solve_by_gradients" else 1e-3)
    torch.testing.assert_close(c * operator.A_adjoint(found_z), found_u, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["matrix", "mask", "selected pixels", "averages", "blur"])
def test_without_noise_the_solution_reproduces_the_measurement(name):
    operator = LinearOperator(OPERATORS[name][0], SHAPE)
    y = operator.A(random(SHAPE, 7))
    u = operator.solve(y, 4.0, 0.0)[1]
    assert (operator.A(u) - y).abs().max() < 1e-3 * y.abs().max()
    if name in ("mask", "selected pixels"):
        assert torch.equal(operator.A(u), y)


def test_conjugate_gradients_and_prox_agree_with_the_closed_form(monkeypatch):
    exact = LinearOperator(blur, SHAPE)
    matrix = dense(exact)[0].float()

    def prox_l2(z, y, gamma):
        system = torch.eye(128) / gamma + matrix.mT @ matrix
        return torch.linalg.solve(system, exact.A_adjoint(y).flatten(1).mT).mT.reshape(SHAPE)

    monkeypatch.setattr(operators, "MAX_SPECTRAL", 16)
    with_prox = Objects(exact.A, exact.A_adjoint)
    with_prox.prox_l2 = prox_l2
    wrong_prox = Objects(exact.A, exact.A_adjoint)
    wrong_prox.prox_l2 = lambda z, y, gamma: prox_l2(z, y, 2 * gamma)
    r = exact.A(random(SHAPE, 7))
    for c in (0.01, 1.0, 20.0):
        expected = exact.solve(r, c, 0.01)
        for given, way, tolerance in (
            (blur, "_solve_by_gradients", 0.01),
            (with_prox, "_solve_by_prox", 1e-3),
            (wrong_prox, "_solve_by_gradients", 0.01),
        ):
            operator = LinearOperator(given, SHAPE)
            assert solver_name(operator) == way
            assert abs(operator.norm / exact.norm - 1) < 0.02
            for found, right in zip(operator.solve(r, c, 0.01), expected, strict=True):
                assert (found - right).norm() < tolerance * right.norm()


def test_gradients_do_not_depend_on_the_batch(monkeypatch):
    monkeypatch.setattr(operators, "MAX_SPECTRAL", 16)
    r = LinearOperator(blur, SHAPE).A(random(SHAPE, 7))
    together = LinearOperator(blur, SHAPE).solve(r, 1.0, 0.01)
    alone = LinearOperator(blur, (1, *SHAPE[1:])).solve(r[1:2], 1.0, 0.01)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:2], b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0, 1e6])
def test_gradients_stay_where_they_are_exact(monkeypatch, size):
    # 6 numbers are found in 6 iterations, and up to 100 are taken
    matrix, r = random((6, 16), 3) / 2, size * random((2000, 6), 9)
    monkeypatch.setattr(operators, "MAX_SPECTRAL", 0)
    operator = LinearOperator(matrix, (2000, 1, 4, 4))
    assert solver_name(operator) == "_solve_by_gradients"
    square = matrix.double() @ matrix.double().mT
    for c, variance in ((0.01, 0.0), (1.0, 0.0), (1.0, 0.001), (100.0, 0.0001)):
        shift = max(variance, c * operator.norm**2 / operators.CG_CONDITION)
        expected = torch.linalg.solve(shift * torch.eye(6) + c * square, r.double().mT).mT
        z, u = operator.solve(r, c, variance)
        assert ((z - expected).norm(dim=1) <= 1e-4 * expected.norm(dim=1)).all()
        expected = c * expected @ matrix.double()
        assert ((u.flatten(1) - expected).norm(dim=1) <= 1e-4 * expected.norm(dim=1)).all()


def test_global_randomness_is_left_alone():
    state = torch.get_rng_state()
    LinearOperator(blur, SHAPE)
    assert torch.equal(state, torch.get_rng_state())


def in_place(x):
    """A mask, linear by what it returns, that changes its argument."""
    return x.mul_(MASK)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (lambda x: x.clamp(-1, 1), "must be linear"),
        (lambda x: x.square(), "must be linear"),
        (lambda x: x.relu(), "must be linear"),
        (lambda x: x + 0.1, r"A\(0\) is not 0"),
        (lambda x: x + 0.1 * torch.randn(x.shape), "is not 0"),
        (lambda x: x * torch.rand(x.shape), "the same answer each time"),
        (lambda x: x - x.mean(0), "act on each image by itself"),
        (lambda x: x.flip(0), "act on each image by itself"),
        (lambda x: 0 * x, "measures nothing"),
        (lambda x: x / 0, "not finite"),
        (lambda x: x.sum(), r"must take \(3, 2, 8, 8\) to \(3, ...\)"),
        (lambda x: x[:1], "must take"),
        (lambda x: x.numpy(), "must return a tensor"),
        (lambda x: F.conv2d(x, torch.ones(1, 3, 3, 3)), "cannot be applied to 3 images of 2 × 8 × 8"),
        (lambda x: x.detach() * 2, "autograd cannot follow"),
        (MATRIX[:, :100], r"must have the shape \(m, 128\), not \(20, 100\)"),
        (np.ones(128), "must have the shape"),
        ("blur", "not str"),
        (Objects(lambda x: 2 * x, lambda y: y), "A_adjoint is not the adjoint"),
        (Objects(blur, blur), "A_adjoint is not the adjoint"),
        (Objects(lambda x: F.avg_pool2d(x, 2), lambda y: F.interpolate(y, scale_factor=2)), "is not the adjoint"),
        (Objects(lambda x: x, lambda y: y * torch.nan), "is not the adjoint"),
        (Objects(lambda x: F.avg_pool2d(x, 2), lambda y: y), "A_adjoint cannot be applied to"),
        (in_place, "leave the images that it is given"),
        (Objects(in_place, lambda y: y * MASK), "leave the images that it is given"),
        (Objects(lambda x: x * MASK, in_place), "A_adjoint must leave the measurements that it is given"),
    ],
)
def test_refuses_what_is_not_a_linear_operator(operator, message):
    with pytest.raises(ValueError, match=message):
        LinearOperator(operator, SHAPE)


def test_takes_the_physics_of_deepinv():
    deepinv = pytest.importorskip("deepinv")
    shape = (2, 1, 28, 28)
    physics = deepinv.physics
    kernel = torch.outer(torch.tensor([0.1, 0.3, 0.6]), torch.tensor([0.2, 0.5, 0.3]))[None, None]
    cases = {
        "inpainting": (physics.Inpainting((1, 28, 28), mask=0.4), "_diagonal_solver"),
        "downsampling": (physics.Downsampling((1, 28, 28), factor=2, filter="gaussian"), "_spectral_solver"),
        "blur": (physics.Blur(filter=kernel, padding="circular"), "_spectral_solver"),
        "blur by FFT": (physics.BlurFFT((1, 28, 28), filter=kernel), "_spectral_solver"),
        "compressed sensing": (physics.CompressedSensing(100, (1, 28, 28)), "_spectral_solver"),
        "tomography": (physics.Tomography(20, img_width=28), "_spectral_solver"),
    }
    for name, (given, way) in cases.items():
        operator = LinearOperator(given, shape)
        assert solver_name(operator) == way, name
        r = operator.A(random(shape, 1))
        z, u = operator.solve(r, 2.0, 0.1)
        back = 0.1 * z + operator.A(u)
        left = (back - r).norm() / r.norm()
        assert left < 0.01, (name, left)


def test_uses_the_closed_form_of_deepinv(monkeypatch):
    deepinv = pytest.importorskip("deepinv")
    monkeypatch.setattr(operators, "MAX_SPECTRAL", 16)
    kernel = torch.tensor([[0.1, 0.2, 0.1], [0.1, 0.2, 0.1], [0.0, 0.1, 0.1]])[None, None]
    operator = LinearOperator(deepinv.physics.BlurFFT((1, 28, 28), filter=kernel), (2, 1, 28, 28))
    assert solver_name(operator) == "_solve_by_prox"
    r = operator.A(random((2, 1, 28, 28), 1))
    z, u = operator.solve(r, 2.0, 0.1)
    assert (0.1 * z + operator.A(u) - r).norm() < 1e-3 * r.norm()
