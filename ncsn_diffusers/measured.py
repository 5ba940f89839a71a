"""The denoiser of data that were measured: E[x0 | x, y] for any linear operator.

The problem
-----------
A measurement y = A x0 + n is given, with a linear operator A (a mask, a blur, averages, a projection) and noise n ~
N(0, sigma_y² I); wanted are images x0 drawn from p(x0 | y), where p(x0) is the network's. A sampler of p(x0) becomes
one of p(x0 | y) when at every level the estimate D(x, sigma) = E[x0 | x] gives way to E[x0 | x, y], which the network
does not know.

The estimate
------------
Let the data be Gaussian, x0 ~ N(m, S), and x = x0 + sigma z. Given x, x0 is Gaussian with

    mean D(x, sigma) = m + S (S + sigma²)⁻¹ (x - m)    and covariance    C = sigma² J,    J = S (S + sigma²)⁻¹,

J being the Jacobian of D. The measurement then adds, by the formula for conditional Gaussians,

    E[x0 | x, y] = D(x, sigma) + C Aᵀ mu,    mu = (A C Aᵀ + sigma_y²)⁻¹ (y - A D(x, sigma)).

C = sigma² J and D is affine, so that D(x, sigma) + C Aᵀ mu = D(x + sigma² Aᵀ mu, sigma): no Jacobian is left. And mu
solves its equation exactly where, multiplied out,

    E[x0 | x, y] = D(x + sigma² Aᵀ mu, sigma)    with    A D(x + sigma² Aᵀ mu, sigma) + sigma_y² mu = y.          (1)

The network is asked about a shifted x, the shift being such that the answer agrees with the measurement. For other data
(1) is an approximation.

The multiplier
--------------
On average over x, mu is sigma_y⁻² (y - A E[x0 | y]), whatever sigma is: it belongs to the data, not to the level. So it
is carried down the ladder from 0, and at each level improved as follows. With c = sigma²,

1.  x̃ = x + c Aᵀ mu,   D = D(x̃, sigma),   r = y - A D - sigma_y² mu.
2.  One iteration of conjugate gradients on (1), whose matrix is sigma_y² + c A J Aᵀ, preconditioned by J = 1:
    z = (sigma_y² + c A Aᵀ)⁻¹ r,   Jz = D(x̃ + c Aᵀ z, sigma) - D,   q = sigma_y² z + A Jz,   a = ⟨r, z⟩/⟨z, q⟩,
    for each image, 0 where ⟨z, q⟩ ≤ 10⁻⁴ ⟨r, z⟩ (the network's noise, where J is almost 0). Where that a is over four
    times ⟨r, q⟩/⟨q, q⟩, which leaves the least residual, it is that one: most of q is no response to z then;
    mu += a z,   D += a Jz,   r -= a q.
3.  z = (sigma_y² + c A Aᵀ)⁻¹ r,   D_y = D + c Aᵀ z,   mu += z.

The scheduler steps with D_y in the place of D, whichever it is. 2 takes a second network evaluation; 3 takes none,
since it holds J = 1: x0 is taken to be as uncertain as x is noisy. Where the data vary less than that, it believes the
measurement too much, and mu at the next level makes up for it. Backward passes are not needed.

This is exact for Gaussian data as the steps become many. It is not for mixtures of far-apart modes, where the share of
each mode is decided at levels where (1) is only an approximation.

The end
-------
The last step lands on the estimate D_y at the smallest level sigma_L: what is uncertain below sigma_L is not drawn. In
directions that the measurement fixes to a precision near sigma_L or finer, that would be all of it. The last estimate
is therefore drawn from the Gaussian that (1) describes, at the cost of the evaluation of 2: with fresh normal e and n,

    e' = sigma_L J e,    x0 = D_y + e' + c Aᵀ (sigma_y² + c A Aᵀ)⁻¹ (sigma_y n - A e').                            (2)
"""

import math
from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor

from .operators import LinearOperator, dot, expand

# The least share of ⟨r, z⟩ that ⟨z, q⟩ may be: below it the network's Jacobian is lost in its noise.
LEAST_CURVATURE = 1e-4
# The largest a, in units of the step that leaves the least residual. At 4 the residual grows by √3, as it may with an
# exact network of Gaussian data; on clothes with a hole it grew tenfold.
LONGEST_STEP = 4.0
# The step of the last difference of D, in units of sigma: the network is told sigma and sees 1.04 sigma.
LAST_STEP = 0.3


class Measured:
    """
    The denoiser E[x0 | x, y] of measured data, equation (1) of the module's docstring, in the network's units.

    It remembers the multiplier of the chain that it serves: each chain needs its own.

    Args:
        denoiser (denoiser): D(x, sigma) of all data.
        operator ([`LinearOperator`]): A.
        measurement (`torch.Tensor` of `operator.measurement_shape`): y.
        noise_std (`float`): sigma_y.
        num_evaluations (`int`, *optional*):
            After so many calls the chain ends, and the estimate is drawn by (2) where there is noise.
        generator (`torch.Generator` or a list of them, *optional*): The randomness of (2).
    """

    def __init__(
        self,
        denoiser: Callable,
        operator: LinearOperator,
        measurement: torch.Tensor,
        noise_std: float,
        num_evaluations: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ):
        self.denoiser, self.operator, self.y = denoiser, operator, measurement
        self.noise_std, self.generator = noise_std, generator
        self.to_come = math.inf if num_evaluations is None or noise_std == 0 else num_evaluations
        self.mu = torch.zeros_like(measurement)
        self.shift = torch.zeros(operator.shape, device=measurement.device, dtype=measurement.dtype)  # Aᵀ mu

    def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        operator, c, variance = self.operator, sigma**2, self.noise_std**2
        self.to_come -= 1
        shifted = x + c * self.shift  # 1.
        denoised = self.denoiser(shifted, sigma)
        r = self.y - operator.A(denoised) - variance * self.mu
        if self.to_come > 0:
            z, u = operator.solve(r, c, variance)  # 2.
            moved = self.denoiser(shifted + u, sigma) - denoised
            q = variance * z + operator.A(moved)
            a = _step_length(r, z, q)
            self.mu = self.mu + expand(a, z) * z
            self.shift = self.shift + expand(a / c, u) * u
            denoised = denoised + expand(a, moved) * moved
            r = r - expand(a, q) * q
        else:
            e = randn_tensor(x.shape, generator=self.generator, device=x.device, dtype=torch.float32)
            n = randn_tensor(r.shape, generator=self.generator, device=x.device, dtype=torch.float32)
            moved = (self.denoiser(shifted + LAST_STEP * sigma * e, sigma) - denoised) / LAST_STEP  # (2)
            denoised, r = denoised + moved, r + self.noise_std * n - operator.A(moved)
        z, u = operator.solve(r, c, variance)  # 3.
        self.mu, self.shift = self.mu + z, self.shift + u / c
        return denoised + u


def _step_length(r: torch.Tensor, z: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """a of each image in 2. of the module's docstring, of shape `(n,)`."""
    rz, zq = dot(r, z), dot(z, q)
    a = torch.where(zq > LEAST_CURVATURE * rz, rz / zq, 0.0)
    least = dot(r, q).clamp(min=0) / dot(q, q).clamp(min=torch.finfo(q.dtype).tiny)
    return torch.where(a <= LONGEST_STEP * least, a, least)
