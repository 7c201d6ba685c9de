"""The frozen table E: one vector per token, made from the training stream alone or from nothing, or GPT-2's.

A table is a float32 tensor `(V, D)`, a function of its arguments: same inputs, same bits (on one machine, with
one number of threads), and the global random states stay as they were. The one free constant of those made
here, the scale, is set by `calibrate`; GPT-2's is taken as it is.
Letters: `N` tokens of the stream, `V` vocabulary size, `D` embedding dimension.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from scipy import optimize, sparse

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.text import hub

Ids = NDArray[np.int64]

EXCESS_NATS = 0.1
"""How far above ln V the untrained model's loss may lie."""

CONTEXT_SMOOTHING = 0.75
"""Power on the context counts in the PPMI; 1 would favour rare contexts (Levy, Goldberg & Dagan, 2015)."""

FILLER = 0.25
"""Size of the random filler of empty rows and columns, relative to the table's root mean square."""

OVERSAMPLING = 32
"""Directions the randomised SVD computes beyond those it returns."""

POWER_STEPS = 2

RANK_TOLERANCE = 1e-4
"""Singular values below this share of the largest, and rows below this share of the mean, count as zero."""

LAYER_NORM_EPS = 1e-5
"""torch's default, which the model's LayerNorm uses; it is felt where a scaled row's variance is as small."""

SCALE_TOLERANCE = 1e-3
"""Relative accuracy of the scale: 1e-3 moves the untrained loss by about 1e-3 nats."""

CHUNK = 256
"""Rows of logits at a time: bounds memory where V is large."""

PAIRS_AT_A_TIME = 1 << 20
"""Pairs of neighbours counted at a time: bounds memory where N is large."""

TINY = float(np.finfo(np.float32).tiny)

GPT2_NAMES = ("wte.weight", "transformer.wte.weight")
"""What GPT-2's embedding is called in its safetensors files, without and with the language model around it."""

GPT2_SHAPE = (50257, 768)

SAMPLE = 1024
"""Token pairs whose mean loss `calibrate` measures."""


def _normal(rows: int, columns: int, seed: int, purpose: str) -> torch.Tensor:
    # One stream of numbers per purpose: noise drawn like the table would be the table, and no noise to it.
    generator = np.random.default_rng([seed, *purpose.encode()])
    return torch.from_numpy(generator.standard_normal((rows, columns), np.float32))


def ppmi(ids: Ids, vocab_size: int, window: int = 4) -> sparse.csr_array:
    """Positive pointwise mutual information of tokens and their neighbours, sparse `(V, V)`.

    n(w, c) sums 1/g over the pairs g tokens apart, g = 1 … `window`, to either side: nearer neighbours say
    more about what comes next. With n(w), n(c) its marginals and α = `CONTEXT_SMOOTHING`,
    PPMI(w, c) = max(0, ln [n(w, c) / n(w) · Σ_c' n(c')^α / n(c)^α])  (Levy, Goldberg & Dagan, 2015).
    """
    shape = (vocab_size, vocab_size)
    counts = sparse.csr_array(shape)
    for gap in range(1, window + 1):
        for start in range(0, max(len(ids) - gap, 0), PAIRS_AT_A_TIME):
            right = ids[start + gap : start + gap + PAIRS_AT_A_TIME]
            left = ids[start : start + len(right)]
            counts += sparse.coo_array((np.full(len(right), 1 / gap), (left, right)), shape=shape).tocsr()
    cells = (counts + counts.T).tocoo()
    marginal = np.bincount(cells.row, cells.data, vocab_size)
    smoothed = marginal**CONTEXT_SMOOTHING
    ratio = cells.data / marginal[cells.row] * smoothed.sum() / smoothed[cells.col]
    kept = ratio > 1
    places = (cells.row[kept], cells.col[kept])
    return sparse.coo_array((np.log(ratio[kept]), places), shape=shape).tocsr()


def truncated_svd(matrix: sparse.csr_array, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left singular vectors `(V, K)` and singular values `(K,)`, K = min(rank, V), largest first.

    Randomised range finder with `POWER_STEPS` orthonormalised power iterations (Halko, Martinsson & Tropp,
    2011); exact where rank + `OVERSAMPLING` reaches V.
    """
    A, A_transposed = _as_torch(matrix), _as_torch(matrix.T)
    V = matrix.shape[0]
    Q = _normal(V, min(rank + OVERSAMPLING, V), seed, "sketch")
    Q = torch.linalg.qr(torch.sparse.mm(A, Q)).Q
    for _ in range(POWER_STEPS):
        Q = torch.linalg.qr(torch.sparse.mm(A, torch.sparse.mm(A_transposed, Q))).Q
    B = torch.sparse.mm(A_transposed, Q).double()
    squares, vectors = torch.linalg.eigh(B.T @ B)
    K = min(rank, V)
    values = squares.flip(0)[:K].clamp(min=0).sqrt().float()
    return Q @ vectors.flip(1)[:, :K].float(), values


def _as_torch(matrix: sparse.csr_array) -> torch.Tensor:
    cells = matrix.tocoo()
    places = torch.from_numpy(np.stack([cells.row, cells.col]).astype(np.int64))
    values = torch.from_numpy(cells.data.astype(np.float32))
    return torch.sparse_coo_tensor(places, values, cells.shape, check_invariants=False).coalesce()


def svd_table(ids: Ids, vocab_size: int, dim: int, window: int = 4, seed: int = 42) -> torch.Tensor:
    """U √S of the truncated SVD of the training stream's PPMI, rows of one length, calibrated, `(V, D)`.

    The power ½ of S and rows of equal length follow Levy, Goldberg & Dagan (2015): frequent tokens would
    else have the longest rows, predict themselves most, and keep the scale of all others down. Columns
    beyond the matrix's rank are small noise. Rows of tokens without a neighbour worth noting are noise too,
    half of it common to all of them, so that a model can learn at once that none of them comes. `ValueError`
    where an id is not in [0, V).
    """
    U, S = truncated_svd(ppmi(ids, vocab_size, window), dim, seed)
    S = torch.where(S / S[0].clamp(min=TINY) > RANK_TOLERANCE, S, 0.0)
    missing = (0, dim - len(S))
    table = _fill(F.pad(U * S.sqrt(), missing), F.pad(S, missing) == 0, seed)
    return calibrate(F.normalize(table, dim=1), ids, seed)


def _fill(table: torch.Tensor, empty_columns: torch.Tensor, seed: int) -> torch.Tensor:
    size = table.square().mean().sqrt()
    empty_rows = table.norm(dim=1, keepdim=True) <= RANK_TOLERANCE * size
    V, D = table.shape
    noise = _normal(V, D, seed, "filler") * (FILLER * size if size > 0 else 1.0)
    shared = noise[:1].roll(1, dims=1)  # no token's own noise
    return torch.where(empty_rows, noise + shared, torch.where(empty_columns, noise, table))


def random_table(vocab_size: int, dim: int, seed: int = 42) -> torch.Tensor:
    """Rows from N(0, 1), calibrated on pairs of uniformly drawn tokens, `(V, D)`."""
    table = _normal(vocab_size, dim, seed, "table")
    uniform = np.random.default_rng(seed).integers(0, vocab_size, SAMPLE + 1)
    return calibrate(table, uniform, seed)


def gpt2_table(file: str | None = None) -> torch.Tensor:
    """GPT-2's token embedding, `(50257, 768)`, from a safetensors file, of which nothing else is read.

    `file` None: the file on the hub. A UserError where there is no such file, or none with such a tensor.
    """
    path = Path(file).expanduser() if file is not None else Path(hub.gpt2_weights())
    place = f"embedding.file={path}"
    try:
        with safe_open(path, framework="pt") as tensors:
            name = next((name for name in GPT2_NAMES if name in tensors.keys()), None)  # noqa: SIM118 - no mapping
            if name is None:
                raise UserError(f"{place} has no tensor {' or '.join(GPT2_NAMES)}: give a file of GPT-2's weights.")
            shape = tuple(tensors.get_slice(name).get_shape())
            if shape != GPT2_SHAPE:
                raise UserError(f"{place} has {name} of shape {shape}, but embedding=gpt2 needs {GPT2_SHAPE}.")
            return tensors.get_tensor(name).float()
    except FileNotFoundError:
        raise UserError(f"{place} does not exist: 'python -m ctxkv_lightning fetch FOLDER' makes it.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{place} is not a readable safetensors file ({str(error).splitlines()[0]}).") from None


def calibrate(table: torch.Tensor, ids: Ids, seed: int = 42) -> torch.Tensor:
    """The table times the largest constant at which the untrained tied model loses ln V + `EXCESS_NATS`.

    The untrained model ends in h = LayerNorm(E[x]) + LayerNorm(noise), for its attention adds little to the
    token's own vector x and its feed-forward layer noise; logits are h Eᵀ. The loss, log-sum-exp minus the
    next token's logit, is averaged over up to `SAMPLE` pairs of neighbours in `ids (N,)`, N ≥ 1, spaced
    evenly. It is ln V at 0 and convex (but for LayerNorm's epsilon), so it crosses once; a table that never
    crosses, such as one of a single token, gets a root mean square of 1. Beyond the constant every token
    would predict itself.
    """
    table = table / table.square().mean().sqrt().clamp(min=TINY)
    excess = _excess_loss(table, ids, seed)
    low, high = 0.0, 1 / table.shape[1]
    while excess(high) <= EXCESS_NATS:
        if high >= 1:
            return table
        low, high = high, 2 * high
    return table * optimize.brentq(lambda scale: excess(scale) - EXCESS_NATS, low, high, rtol=SCALE_TOLERANCE)


def _excess_loss(table: torch.Tensor, ids: Ids, seed: int) -> Callable[[float], float]:
    """The untrained model's loss above ln V, as a function of the table's scale."""
    V, D = table.shape
    ids = np.asarray(ids, np.int64)
    starts = np.linspace(0, max(len(ids) - 2, 0), min(SAMPLE, max(len(ids) - 1, 1))).astype(np.int64)
    following = torch.from_numpy(ids[np.minimum(starts + 1, len(ids) - 1)])
    # LayerNorm only rescales a centred row, so both products with the table are made once for all scales.
    rows = table[torch.from_numpy(ids[starts])]
    centred = rows - rows.mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1, keepdim=True)
    noise = F.layer_norm(_normal(len(starts), D, seed, "noise"), (D,))
    parts = [centred @ table.T, variance, noise @ table.T, following]

    def excess(scale: float) -> float:
        total = 0.0
        for own, var, random, target in zip(*(part.split(CHUNK) for part in parts), strict=True):
            logits = scale * (own * scale / (scale**2 * var + LAYER_NORM_EPS).sqrt() + random)
            total += F.cross_entropy(logits, target, reduction="sum").item()
        return total / len(starts) - math.log(V)

    return excess
