"""Origin-anchored centroid dispersion: the loss of Phase 1 and what is read off it. Pure functions."""

import torch
from torch import Tensor

ROWS_AT_A_TIME = 65_536


def oacd_loss(contexts: Tensor, centroid_weight: float = 0.1) -> Tensor:
    """Dispersion loss of n contexts (n, C) with mean m: -‖X - m‖_F / n + centroid_weight ‖m‖².

    The first term drives the contexts apart, the second keeps their centroid at the origin.
    """
    centroid = contexts.mean(dim=0)
    dispersion = torch.linalg.vector_norm(contexts - centroid) / len(contexts)
    return centroid_weight * centroid.square().sum() - dispersion


def convergence_rate(current: Tensor, previous: Tensor, threshold: float = 0.03) -> float:
    """Share of positions, in [0, 1], whose context moved by less than `threshold`.

    The move of a position is the mean over C of the squared difference; both tensors are (N, C).
    """
    return int(still_positions(current, previous, threshold)) / len(current)


def still_positions(current: Tensor, previous: Tensor, threshold: float = 0.03) -> Tensor:
    """How many positions moved by less than `threshold`, (), counted on the device of the contexts (N, C)."""
    still = torch.zeros((), dtype=torch.long, device=current.device)
    for start in range(0, len(current), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        moved = (current[rows] - previous[rows]).square_().mean(dim=1)
        still += (moved < threshold).sum()
    return still


def singular_values(contexts: Tensor) -> Tensor:
    """Singular values (C,) of contexts (N, C), largest first, in fp64.

    They are the square roots of the eigenvalues of the C×C Gram matrix, so that every token counts and
    none is sampled; the matrix is summed over blocks of rows, which bounds the memory.
    """
    C = contexts.shape[1]
    gram = torch.zeros(C, C, dtype=torch.float64, device=contexts.device)
    for start in range(0, len(contexts), ROWS_AT_A_TIME):
        rows = contexts[start : start + ROWS_AT_A_TIME].double()
        gram.addmm_(rows.T, rows)
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)


def effective_rank(contexts: Tensor) -> float:
    """exp(entropy of the singular values normalised to sum 1) / C, in (0, 1].

    Roy and Vetterli, "The effective rank", 2007. All-zero contexts have rank 0.
    """
    return effective_rank_of(singular_values(contexts))


def effective_rank_of(singular: Tensor) -> float:
    """The same from singular values (C,) already at hand."""
    total = singular.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(singular / total).sum().exp()) / len(singular)


def has_plateaued(rates: list[float], above: float = 0.5, gain: float = 0.01) -> bool:
    """Whether the last two iterations, both above `above`, each raised the convergence rate by less than `gain`."""
    if len(rates) < 3:
        return False
    before, previous, last = rates[-3:]
    return min(previous, last) > above and previous - before < gain and last - previous < gain
