"""Linear operators A, as users have them, and what a measurement y = A x + n asks of them.

Three things are taken for an operator: a torch function of a batch of images (its adjoint comes from autograd), an
object with the methods `A` and `A_adjoint`, such as those of `deepinv.physics`, and a matrix that acts on flattened
images. Whether it is linear, acts on each image by itself and has the adjoint it claims is tried out on random images
when it is taken, and refused where it does not.

The solve
---------
Given r in the space of the measurements, levels sigma and sigma_y, with c = sigma² and v = sigma_y², wanted are

    z = (v + c A Aᵀ)⁻¹ r        and        u = c Aᵀ z.                                                       (1)

It is done in the first of these ways that fits:

1. *A Aᵀ is diagonal*: masks, averages over separate blocks, rotations. d = A Aᵀ 1 is then its diagonal, and
   A Aᵀ g = d g holds for a random g; for any other matrix it fails with probability 1.
2. *The operator is small* (at most `MAX_SPECTRAL` numbers on the smaller side): its singular values, once, in float64.
3. *The operator has `prox_l2`*, as deepinv's have: u = prox_l2(0, r, c/v) and z = (r - A u)/v, where it proves right on
   random numbers.
4. *Conjugate gradients* with a fixed number of iterations, so that no image depends on its batch and nothing waits for
   the device: as many as leave a share `CG_TOLERANCE` of the error, at most `CG_ITERATIONS`.

Directions that the operator hardly measures are left alone where they drown in rounding: the eigenvalues of
v + c A Aᵀ are raised to 10⁻⁶ c ‖A‖² (10⁻¹² where A Aᵀ is diagonal, so that each row has a rounding of its own), and
with conjugate gradients v to c ‖A‖²/`CG_CONDITION`. Who iterates on the residual, as [`NCSNPosteriorPipeline`] does,
ends at the same point.

Functions that are not linear are refused. To linearize them at D was tried, in one dimension with the exact D of
N(0, 1), 20,000 chains of 400 levels, noise 0.2 and 0.05: for x0² + n = 0.49 all chains diverge, and for
clip(x0, -0.5, 0.5) + n = 0.5 the mean is off by 0.5 and 0.1 posterior deviations and the squared misfit by factors of
5 and 200: where the function is flat, there is no slope to follow.
"""

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

MAX_SPECTRAL = 3072  # 32 × 32 pixels in color
MAX_MATRIX = 2**24  # entries of the whole matrix
FLOOR = 1e-6
CG_ITERATIONS = 100
CG_TOLERANCE = 1e-3
CG_CONDITION = 1e4
CG_DONE = 1e-16  # of the squared residual
TOLERANCE = 1e-3  # of linearity and of the adjoint: projectors of tomography are no more exact


def _in_float32(method: Callable) -> Callable:
    """Compute in plain float32, whatever autocast, default type and TF32 the caller has set."""

    @functools.wraps(method)
    def compute(self, *args):
        default, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
        cudnn = torch.backends.cudnn.flags(torch.backends.cudnn.enabled, allow_tf32=False)
        try:
            if default != torch.float32:
                torch.set_default_dtype(torch.float32)
            if precision != "highest":
                torch.set_float32_matmul_precision("highest")
            with (
                torch.autocast(self.device.type, enabled=False),
                cudnn if self.device.type == "cuda" else nullcontext(),
            ):
                return method(self, *args)
        finally:
            if default != torch.float32:
                torch.set_default_dtype(default)
            if precision != "highest":
                torch.set_float32_matmul_precision(precision)

    return compute


class LinearOperator:
    """
    A linear operator on batches of images, checked, with its adjoint and the solve (1) of the module's docstring.

    Complex measurements are held as real ones with a last axis of 2, the real and the imaginary part.

    Args:
        operator (function, object with `A` and `A_adjoint`, or matrix `(m, channels * height * width)`):
            A, in units of the data. A function takes `(batch_size, channels, height, width)` to `(batch_size, ...)`.
        shape (`tuple[int, ...]`): `(batch_size, channels, height, width)` of the images, or of other data.
        device (`str` or `torch.device`): Where the images are.
        scale (`torch.Tensor`, *optional*): Broadcastable to `shape`; the operator is then A diag(scale).
        noise_std (`torch.Tensor`, *optional*):
            Broadcastable to the measurement, above 0; the operator is then diag(1/noise_std) A, whose measurements
            have noise of standard deviation 1 each. See [`whiten`].

    Attributes:
        measurement_shape (`tuple`): The shape of A x, `(batch_size, ...)`, the last axis 2 for complex measurements.
        is_complex (`bool`): Whether the measurements are complex.
        norm (`float`): ‖A‖, the largest singular value, to a few per cent.

    Raises:
        ValueError: it is no operator, does not take images of this shape, is not linear, mixes the images of a batch,
            measures nothing, changes what it is given in place, or its adjoint is not the adjoint.
    """

    def __init__(
        self,
        operator: Any,
        shape: tuple[int, ...],
        device: str | torch.device = "cpu",
        scale: torch.Tensor | None = None,
        noise_std: torch.Tensor | None = None,
    ):
        self.shape, self.device = tuple(shape), torch.device(device)
        self._prox = getattr(operator, "prox_l2", None)
        self._forward, self._adjoint = self._read(operator)
        self._noise_std = None if noise_std is None else noise_std.to(self.device, torch.float32)
        if scale is not None or noise_std is not None:
            self._rescale(1.0 if scale is None else scale.to(self.device))
        self._generator = torch.Generator().manual_seed(0)  # the user's own stay as they are
        self._check_linear()
        self._check_adjoint()
        self._choose_solver()

    # A and its adjoint

    def _rescale(self, scale: torch.Tensor | float) -> None:
        """Replace A by diag(1/noise_std) A diag(scale)."""
        forward, adjoint, stds = self._forward, self._adjoint, self._noise_std
        inverse = 1.0 if stds is None else 1 / stds
        self._prox = None  # of the operator as it was
        self._forward = lambda x: forward(x * scale) * inverse
        if adjoint is not None:
            self._adjoint = lambda y: adjoint(y * inverse).reshape(self.shape) * scale

    def whiten(self, y: torch.Tensor) -> torch.Tensor:
        """A measurement, of `measurement_shape`, in units of its noise, as `noise_std` was given."""
        return y / (self._noise_std[..., None] if self.is_complex else self._noise_std)

    def sizes_of_rows(self, scale: torch.Tensor, num_probes: int = 8) -> torch.Tensor:
        """
        By how much `scale`, broadcastable to `shape`, makes each number of A diag(scale) x larger than of A x: the unit
        that each measured number is in. Of the measurement's shape, without the last axis of complex ones.
        """
        before, after = 0.0, 0.0
        for _ in range(num_probes):
            x = self._randn(self.shape)
            before, after = before + self.A(x) ** 2, after + self.A(scale * x) ** 2
        if self.is_complex:
            before, after = before.sum(-1), after.sum(-1)
        measured = before > 1e-12 * before.max()
        return torch.where(measured, (after / before.clamp(min=1e-30)).sqrt(), scale.max())

    @_in_float32
    def A(self, x: torch.Tensor) -> torch.Tensor:  # noqa: N802 (as deepinv calls it)
        """A x, of `measurement_shape`, for x of `shape`."""
        y = self._forward(x)
        return torch.view_as_real(y).float() if y.is_complex() else y.float()

    @_in_float32
    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:  # noqa: N802
        """Aᵀ y, of `shape`, for y of `measurement_shape`."""
        if self._adjoint is None:
            return self._transpose(y)
        x = self._adjoint(torch.view_as_complex(y) if self.is_complex else y)
        return (x.real if x.is_complex() else x).float().reshape(self.shape)

    def _read(self, operator) -> tuple[Callable, Callable | None]:
        if isinstance(operator, np.ndarray | torch.Tensor):
            matrix, pixels = torch.as_tensor(operator), math.prod(self.shape[1:])
            if matrix.ndim != 2 or matrix.shape[1] != pixels:
                raise ValueError(
                    f"`operator`: a matrix for images of {self._sizes} must have the shape (m, {pixels}), not "
                    f"{tuple(matrix.shape)}."
                )
            matrix = matrix.to(self.device, torch.complex64 if matrix.is_complex() else torch.float32)
            return (
                lambda x: x.flatten(1).to(matrix.dtype) @ matrix.mT,
                lambda y: (y @ matrix.conj()).reshape(-1, *self.shape[1:]),
            )
        if callable(getattr(operator, "A", None)):
            return operator.A, getattr(operator, "A_adjoint", None)
        if callable(operator):
            return operator, None
        raise ValueError(
            "`operator` must be a function of a batch of images, an object with the methods A and A_adjoint, or a "
            f"matrix, not {type(operator).__name__}."
        )

    @property
    def _sizes(self) -> str:
        return " × ".join(map(str, self.shape[1:]))

    def _make_transpose(self) -> Callable:
        """
        The adjoint by autograd. A linear function's graph holds no values of x, so that one serves for all.
        """
        # outside of inference mode, whose tensors autograd does not follow
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.zeros(self.shape, device=self.device, dtype=torch.float32, requires_grad=True)
            y = self.A(x)
        if not y.requires_grad:
            raise ValueError(
                "`operator`: autograd cannot follow this function, so its adjoint is not known. Write it with torch's "
                "own functions, or give an object with A and A_adjoint."
            )
        return lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0]

    # Checks

    def _randn(self, shape) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float32).to(self.device)

    def _apply_first(self, x: torch.Tensor) -> torch.Tensor:
        given = x.clone()
        try:
            y = self._call_forward(given)
        except Exception as error:  # a user's function raises what it likes
            raise ValueError(
                f"`operator` cannot be applied to {len(x)} images of {self._sizes} (channels, height, width) in "
                f"float32: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(y, torch.Tensor):
            raise ValueError(f"`operator` must return a tensor, not {type(y).__name__}.")
        if y.ndim < 2 or len(y) != len(x):
            raise ValueError(
                f"`operator` must take {tuple(x.shape)} to ({len(x)}, ...), the measurements of each image, and "
                f"returned {tuple(y.shape)}."
            )
        if not torch.equal(given, x):
            raise ValueError("`operator` must leave the images that it is given as they are: have it change a copy.")
        self.is_complex = y.is_complex()
        return self.A(x)

    @_in_float32
    def _call_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(x)

    def _check_linear(self) -> None:
        x, other = self._randn(self.shape), self._randn(self.shape)
        y = self._apply_first(x)
        self.measurement_shape = tuple(y.shape)
        if not y.isfinite().all():
            raise ValueError("`operator` returns numbers that are not finite for standard normal images.")
        size = _norm(y)
        offset, mixed = self.A(torch.zeros_like(x)), self.A(0.7 * x - 1.3 * other)
        expected = 0.7 * y - 1.3 * self.A(other)
        why = "The posterior of a nonlinear measurement is not what this method draws from"
        if (_norm(offset) > TOLERANCE * size).any():
            raise ValueError(
                f"`operator` must be linear, but A(0) is not 0: its norm is {_norm(offset).max().item():.3g}. Take the "
                "offset from the operator and from the measurement."
            )
        if (_norm(mixed - expected) > TOLERANCE * (size + _norm(expected))).any():
            error = (_norm(mixed - expected) / _norm(expected)).max().item()
            raise ValueError(
                f"`operator` must be linear, and give the same answer each time, but A(a x + b x') differs from "
                f"a A(x) + b A(x') by {error:.2g} of its norm. {why}."
            )
        if not size.all():
            raise ValueError("`operator` measures nothing: A(x) = 0 for a standard normal x.")
        if len(x) > 1:
            x = torch.cat([other[:1], x[1:]])
            if (_norm(self.A(x) - y)[1:] > TOLERANCE * size[1:]).any():
                raise ValueError(
                    "`operator` must act on each image by itself, but the measurements of one image depend on the "
                    "others of its batch."
                )

    def _check_adjoint(self) -> None:
        if self._adjoint is None:
            self._transpose = self._make_transpose()
        x = self._randn(self.shape)
        y = self.A(x)
        # A part along y finds wrong factors, a random part whatever else is wrong.
        v = y + self._randn(y.shape) * expand(_norm(y), y) / y[0].numel() ** 0.5
        given = v.clone()
        try:
            back = self.A_adjoint(given)
        except Exception as error:
            raise ValueError(
                f"`operator`: A_adjoint cannot be applied to measurements of shape {self.measurement_shape}, which A "
                f"returns, or does not return images of {self._sizes}: {type(error).__name__}: {error}"
            ) from error
        if not torch.equal(given, v):
            raise ValueError(
                "`operator`: A_adjoint must leave the measurements that it is given as they are: have it change a copy."
            )
        left, right = dot(y, v), dot(x, back)
        if not ((left - right).abs() <= TOLERANCE * _norm(y) * _norm(v)).all():  # NaN fails
            raise ValueError(
                "`operator`: A_adjoint is not the adjoint of A: ⟨A x, v⟩ and ⟨x, Aᵀ v⟩ are "
                f"{left[0].item():.4g} and {right[0].item():.4g} for random x and v, and should be equal."
            )

    # The solve

    @_in_float32
    def solve(self, r: torch.Tensor, c: float, variance: float) -> tuple[torch.Tensor, torch.Tensor]:
        """
        z = (variance + c A Aᵀ)⁻¹ r and u = c Aᵀ z.

        Args:
            r (`torch.Tensor` of `measurement_shape`): The residual.
            c (`float`): Above 0.
            variance (`float`): At least 0, where z is the solution of least norm.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: z, of `measurement_shape`, and u, of `shape`.
        """
        return self._solve(r, c, variance)

    def _choose_solver(self) -> None:
        ones = torch.ones(self.measurement_shape, device=self.device, dtype=torch.float32)
        diagonal = self.A(self.A_adjoint(ones))
        g = self._randn(self.measurement_shape)
        product = self.A(self.A_adjoint(g))
        pixels, numbers = math.prod(self.shape[1:]), math.prod(self.measurement_shape[1:])
        if (_norm(product - diagonal * g) <= 1e-5 * _norm(product)).all():
            self.norm = diagonal.max().item() ** 0.5
            self._solve = self._diagonal_solver(diagonal)
        elif (
            min(pixels, numbers) <= MAX_SPECTRAL
            and pixels * numbers <= MAX_MATRIX
            and (matrix := self._find_matrix()) is not None
        ):
            self._solve = self._spectral_solver(matrix)
        else:
            self.norm = self._find_norm()
            self._solve = self._solve_by_prox if self._prox_is_right() else self._solve_by_gradients

    def _diagonal_solver(self, diagonal: torch.Tensor) -> Callable:
        floor = FLOOR**2 * self.norm**2

        def solve(r, c, variance):
            z = r / (variance + c * diagonal).clamp(min=c * floor)
            return z, c * self.A_adjoint(z)

        return solve

    def _find_matrix(self) -> torch.Tensor | None:
        """A as a matrix `(m, n)`, in float64, or `None` where each image has its own."""
        x = self._randn(self.shape)
        y = self.A(x[:1].expand(self.shape).contiguous())
        if (_norm(y - y[:1]) > 1e-6 * _norm(y)).any():
            return None
        transpose = math.prod(self.measurement_shape[1:]) < math.prod(self.shape[1:])
        shape, apply = (self.measurement_shape, self.A_adjoint) if transpose else (self.shape, self.A)
        batch_size, size = shape[0], math.prod(shape[1:])
        units = torch.zeros(batch_size, size, device=self.device, dtype=torch.float32)
        rows = []
        for begin in range(0, size, batch_size):
            count = min(batch_size, size - begin)
            units.zero_()
            units[:count, begin : begin + count].fill_diagonal_(1)
            rows.append(apply(units.reshape(shape)).flatten(1)[:count].cpu().double())  # Apple GPUs have no float64
        rows = torch.cat(rows)
        return rows if transpose else rows.mT

    def _spectral_solver(self, matrix: torch.Tensor) -> Callable:
        """From A = U diag(s) Vᵀ: z = U diag(1/(v + c s²)) Uᵀ r; what of r no image could have made is left out."""
        wide = matrix.shape[0] <= matrix.shape[1]
        eigenvalues, vectors = torch.linalg.eigh(matrix @ matrix.mT if wide else matrix.mT @ matrix)
        kept = eigenvalues > 1e-12 * eigenvalues[-1]
        eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
        if not wide:
            vectors = matrix @ vectors / eigenvalues.sqrt()
        self.norm = eigenvalues[-1].item() ** 0.5
        eigenvalues, vectors = eigenvalues.float().to(self.device), vectors.float().to(self.device)
        floor = FLOOR * self.norm**2

        def solve(r, c, variance):
            z = (r.flatten(1) @ vectors / (variance + c * eigenvalues).clamp(min=c * floor)) @ vectors.mT
            z = z.reshape(r.shape)
            return z, c * self.A_adjoint(z)

        return solve

    def _find_norm(self) -> float:
        """By power iteration, the largest of the batch."""
        x = self._randn(self.shape)
        for _ in range(30):
            x = x / expand(_norm(x), x)
            x = self.A_adjoint(self.A(x))
        return _norm(x).max().item() ** 0.5

    def _prox_is_right(self) -> bool:
        """Whether u = prox_l2(0, r, gamma) solves (Aᵀ A + 1/gamma) u = Aᵀ r, for small gamma and for large."""
        if self._prox is None:
            return False
        r = self.A(self._randn(self.shape)) + self._randn(self.measurement_shape)
        expected = self.A_adjoint(r)
        for gamma in (1 / self.norm**2, 1e4 / self.norm**2):
            try:
                _, u = self._solve_by_prox(r, gamma, 1.0)
            except Exception:  # of another kind than deepinv's
                return False
            error = _norm(self.A_adjoint(self.A(u)) + u / gamma - expected)
            if not (error <= 1e-3 * _norm(expected)).all():
                return False
        return True

    def _solve_by_prox(self, r, c, variance):
        if variance < c * FLOOR * self.norm**2:
            variance = c * FLOOR * self.norm**2
        given = torch.view_as_complex(r) if self.is_complex else r
        u = self._prox(0.0, given, c / variance)
        u = (u.real if u.is_complex() else u).float().reshape(self.shape)
        return (r - self.A(u)) / variance, u

    def _solve_by_gradients(self, r, c, variance):
        # of the system divided by c: (v/c + A Aᵀ) (c z) = r
        shift = max(variance / c, self.norm**2 / CG_CONDITION)
        condition = 1 + 1.1 * self.norm**2 / shift
        iterations = math.ceil(0.5 * condition**0.5 * math.log(2 / CG_TOLERANCE))
        size = expand(_norm(r).clamp(min=1e-30), r)
        residual = r / size
        z, direction, square = torch.zeros_like(r), residual, dot(residual, residual)
        for _ in range(min(iterations, CG_ITERATIONS)):
            product = shift * direction + self.A(self.A_adjoint(direction))
            step = _ratio(square, dot(direction, product))
            z = z + expand(step, r) * direction
            residual = residual - expand(step, r) * product
            last, square = square, dot(residual, residual)
            # An image that is done stays: to go on in numbers that underflow leads away again, as far as it likes.
            square = torch.where(square > CG_DONE, square, 0.0)
            direction = residual + expand(_ratio(square, last), r) * direction
        z = z * size
        u = self.A_adjoint(z)
        return z / c, u


def misfit_in_range(
    operator: LinearOperator, y: torch.Tensor, low: float, high: float, num_steps: int = 30
) -> torch.Tensor:
    """
    The least misfit ‖A x - y‖/√m of any x with numbers from `low` to `high`, of each measurement, by accelerated
    projected gradients (Beck & Teboulle 2009): an upper bound that is near it.

    Args:
        operator ([`LinearOperator`]): A.
        y (`torch.Tensor` of `operator.measurement_shape`): The measurements.
        low (`float`), high (`float`): The range of x.
        num_steps (`int`, defaults to 30): Each takes A and its adjoint once.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """
    x = last = torch.full(operator.shape, (low + high) / 2, device=y.device, dtype=torch.float32)
    momentum, step = 1.0, 1 / (1.05 * operator.norm) ** 2
    for _ in range(num_steps):
        moved = (x - step * operator.A_adjoint(operator.A(x) - y)).clamp(low, high)
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        x, last, momentum = moved + (momentum - 1) / following * (moved - last), moved, following
    return _norm(operator.A(last) - y) / y[0].numel() ** 0.5


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """⟨a, b⟩ of each image or measurement of the batch, `(batch_size,)`."""
    return (a.flatten(1) * b.flatten(1)).sum(1)


def _norm(a: torch.Tensor) -> torch.Tensor:
    return a.flatten(1).norm(dim=1)


def expand(factors: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """One factor for each of the batch, in a shape that multiplies `a`."""
    return factors.reshape(-1, *[1] * (a.ndim - 1))


def _ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a/b, and 0 where both are 0."""
    return torch.where(b > 0, a / b, 0.0)
