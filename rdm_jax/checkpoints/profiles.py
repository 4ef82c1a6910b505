"""Power functions over the images seen, which parameters are averaged with, and their sums.

The average of relative width s at time t (images seen) weighs the parameters at time tau with

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),    0 < tau <= t,

whose standard deviation is s t (EDM2, arXiv 2312.02696, section 3.1). Averages that are kept at
several times add up to one of another width: the weights are a least squares fit of its profile
(section 3.2 and appendix C).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

MISSED = 0.05  # the largest share of a profile that a reconstruction may miss
SINGULAR = 1e-13  # directions below this share of the largest one are rounding


class Fit(NamedTuple):
    """Profiles that add up to another one.

    Attributes:
      weights: of the profiles; their sum is 1.
      missed: L2 norm of the rest, as a share of that of the wanted profile.
    """

    weights: Float[np.ndarray, " n"]
    missed: float


def average_names(widths: Sequence[float]) -> dict[str, float]:
    """The widths of averages by the names that they have in training states and checkpoints."""
    return {f"average{number}": width for number, width in enumerate(widths)}


def exponent(width: float) -> float:
    """gamma of a relative width, from 0 for 12^(-1/2) = 0.289 up for smaller ones.

    The width is the standard deviation ((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))^(1/2) of the
    profile for t = 1; gamma is the largest root of the cubic that follows (EDM2, appendix C).
    """
    share = width**-2
    return float(np.roots([1.0, 7.0, 16.0 - share, 12.0 - share]).real.max())


def inner_products(
    times: Float[np.ndarray, " n"],
    exponents: Float[np.ndarray, " n"],
    other_times: Float[np.ndarray, " m"],
    other_exponents: Float[np.ndarray, " m"],
) -> Float[np.ndarray, "n m"]:
    """The integrals of the products of two lists of profiles, in float64 (EDM2, appendix C)."""
    a, b = exponents[:, None] + 1, other_exponents[None, :] + 1
    t, u = np.log(times)[:, None], np.log(other_times)[None, :]
    power = (a + b - 1) * np.minimum(t, u) - a * t - b * u
    return a * b / (a + b - 1) * np.exp(power)


def fit(times: Sequence[float], widths: Sequence[float], time: float, width: float) -> Fit:
    """Fits the profile of a width at a time by those that are kept.

    The sum of the weights is held at 1, so that what all parameters have in common stays exact.

    Args:
      times, widths: of the profiles that are kept.
      time, width: of the wanted one.
    """
    at = np.asarray(times, np.float64)
    kept = np.asarray([exponent(each) for each in widths], np.float64)
    goal, gamma = np.asarray([time], np.float64), np.asarray([exponent(width)], np.float64)
    products = inner_products(at, kept, at, kept)
    wanted = inner_products(at, kept, goal, gamma)[:, 0]
    # In units of the norms, so that narrow and wide profiles count alike.
    norms = np.sqrt(np.diag(products))
    columns = np.stack([wanted, np.ones_like(wanted)], 1) / norms[:, None]
    solved, *_ = np.linalg.lstsq(products / np.outer(norms, norms), columns, rcond=SINGULAR)
    free, towards_sum = (solved / norms[:, None]).T
    weights = free + towards_sum * (1 - free.sum()) / towards_sum.sum()
    whole = inner_products(goal, gamma, goal, gamma)[0, 0]
    rest = whole - 2 * weights @ wanted + weights @ products @ weights
    return Fit(weights, float(np.sqrt(max(rest, 0.0) / whole)))
