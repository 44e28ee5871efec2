"""Whether two samples follow one law: the test of Kolmogorov and Smirnov."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def kolmogorov(one: Sequence[float] | Tensor, two: Sequence[float] | Tensor) -> float:
    """Largest distance of two empirical distribution functions."""
    samples = [torch.as_tensor(values, dtype=torch.float64) for values in (one, two)]
    places = torch.cat(samples)
    shares = [torch.searchsorted(x.sort().values, places, right=True) / len(x) for x in samples]
    return float((shares[0] - shares[1]).abs().max())


def limit(count: int) -> float:
    """Distance that two samples of `count` from one law exceed once in a hundred times."""
    return 1.63 * math.sqrt(2 / count)
