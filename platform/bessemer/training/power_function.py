"""Power-function averages: their width, their update, and how stored ones are combined into any other.

The average of weights θ at time t with exponent γ is (Karras et al., Analyzing and Improving the Training Dynamics
of Diffusion Models, CVPR 2024, arXiv:2312.02696, section 3)::

    θ̂(t) = ∫₀ᵗ p(τ) θ(τ) dτ      with the profile p(τ) = (γ + 1) τ^γ / t^(γ + 1)

Its width grows with the run, so no old weights need to be forgotten, and γ is named by the relative standard
deviation of the profile, σ_rel. Times are in images throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Combination", "Profiles", "combine", "exponent", "power_beta"]

Floats = NDArray[np.float64]


def exponent(sigma_rel: float) -> float:
    """γ of a profile whose standard deviation is `sigma_rel` of its length (appendix C).

    τ/t has the Beta(γ + 1, 1) distribution, so σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3)), a cubic in γ whose largest
    real root is wanted. Profiles that rise towards the present, γ ≥ 0, have σ_rel ≤ 1/√12 ≈ 0.2887.
    """
    assert 0 < sigma_rel <= 12**-0.5 + 1e-12
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real[np.abs(roots.imag) < 1e-6 * np.abs(roots)].max())


def power_beta(gamma: float, images: int, nimg: int) -> float:
    """Weight of the old average after `images` more images: (1 - images/t)^(γ + 1) with t = `nimg` + `images`.

    Exact for weights that are constant in between, whatever the batch; 0 for the first images of a run.
    """
    return float((1 - images / (nimg + images)) ** (gamma + 1))


@dataclass(frozen=True)
class Profiles:
    """Some profiles p, each with the time at which its average was taken."""

    times: Floats
    """[P] images."""
    gammas: Floats
    """[P]"""

    def inner(self, other: Profiles) -> Floats:
        """∫ pᵢ(τ) qⱼ(τ) dτ for each p here and each q of `other`, [P, Q] (appendix C)."""
        s, a = self.times[:, None], self.gammas[:, None]
        t, b = other.times[None, :], other.gammas[None, :]
        # Logarithms: the powers themselves leave the range of floats for narrow profiles of long runs.
        powers = (a + b + 1) * np.log(np.minimum(s, t)) - (a + 1) * np.log(s) - (b + 1) * np.log(t)
        product: Floats = (a + 1) * (b + 1) / (a + b + 1) * np.exp(powers)
        return product


@dataclass(frozen=True)
class Combination:
    """Weights of stored averages that make up another one."""

    weights: Floats
    """[P], of sum 1; some are negative."""
    residual: float
    """Length of the difference between the wanted profile and the one that is reached, over that of the wanted."""


def combine(stored: Profiles, wanted: Profiles) -> Combination:
    """Weights x that minimise ‖Σ xᵢ pᵢ - q‖² over all x of sum 1, q being the one profile `wanted` (section 3.2).

    The paper leaves the sum free. Every profile integrates to 1, and only weights of sum 1 reproduce what does not
    change in training: without the bound the weights' mean leaks into the error.
    """
    A, b, c = stored.inner(stored), stored.inner(wanted)[:, 0], wanted.inner(wanted)[0, 0]
    # Profiles close in time are nearly parallel; lstsq takes the smallest weights where they cannot be told apart.
    free, towards = np.linalg.lstsq(A, np.stack([b, np.ones_like(b)], 1), rcond=1e-14)[0].T
    x = free + towards * (1 - free.sum()) / towards.sum()
    square = x @ A @ x - 2 * x @ b + c
    return Combination(x, float(np.sqrt(max(square, 0.0) / c)))
