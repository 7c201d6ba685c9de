"""The slow, obvious twins. Every fast path must agree with one of these; they import torch only."""

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional as F


def contexts_step_by_step(encoder, embeddings: Tensor) -> Tensor:
    """c_t = LN(c_{t-1} + GELU(W [c_{t-1}; e_t] + b)), one token after another, with the concatenation built."""
    context = torch.zeros(encoder.context_dim, dtype=embeddings.dtype)
    rows = []
    for embedding in embeddings:
        hidden = F.linear(torch.cat([context, embedding]), encoder.linear.weight, encoder.linear.bias)
        context = F.layer_norm(context + F.gelu(hidden), context.shape, encoder.norm.weight, encoder.norm.bias)
        rows.append(context)
    return torch.stack(rows) if rows else embeddings.new_empty(0, encoder.context_dim)


def recurrent_lm_losses(
    encoder, projection, bias: Tensor, table: Tensor, tokens: Tensor, targets: Tensor, state: Tensor
):
    """Losses (B·n,) of a recurrent language model and its last contexts (B, C), row by row, token by token."""
    losses, last = [], []
    for row, following, context in zip(tokens, targets, state, strict=True):
        for token, target in zip(row, following, strict=True):
            hidden = F.linear(torch.cat([context, table[token]]), encoder.linear.weight, encoder.linear.bias)
            context = F.layer_norm(context + F.gelu(hidden), context.shape, encoder.norm.weight, encoder.norm.bias)
            logits = table @ (projection.weight @ context + projection.bias) / math.sqrt(table.shape[1]) + bias
            losses.append(-logits.log_softmax(dim=0)[target])
        last.append(context)
    return torch.stack(losses), torch.stack(last)


def gather_attention(query: Tensor, key: Tensor, value: Tensor, interval: int, max_contexts: int) -> Tensor:
    """Strided attention slot by slot: query i, at key S+i, sees keys S+i, S+i-I, ..., at most M of them."""
    T, d = query.shape[2:]
    S = key.shape[2] - T
    rows = []
    for i in range(T):
        slots = [S + i - m * interval for m in range(max_contexts) if S + i - m * interval >= 0]
        scores = torch.einsum("bhd,bhmd->bhm", query[:, :, i], key[:, :, slots]) / math.sqrt(d)
        rows.append(torch.einsum("bhm,bhmd->bhd", scores.softmax(dim=-1), value[:, :, slots]))
    return torch.stack(rows, dim=2) if rows else torch.empty_like(query)


def gather_slots(
    query: Tensor, key: Tensor, value: Tensor, intervals, max_contexts: int, selection: str, first=None
) -> Tensor:
    """Attention head by head, query by query, over the slots of a strided or a grid selection."""
    B, H, T, d = query.shape
    S = key.shape[2] - T
    out = torch.empty_like(query)
    for b in range(B):
        existing = 0 if first is None else int(first[b])
        for h in range(H):
            for i in range(T):
                slots = [S + j for j in slots_of(i, S, intervals[h], max_contexts, selection) if S + j >= existing]
                weights = torch.stack([query[b, h, i] @ key[b, h, j] / math.sqrt(d) for j in slots]).softmax(dim=0)
                out[b, h, i] = sum(weight * value[b, h, j] for weight, j in zip(weights, slots, strict=True))
    return out


def slots_of(i: int, S: int, interval: int, max_contexts: int, selection: str) -> list[int]:
    """Positions that query i reads, relative to query 0, newest first; query 0 stands at a multiple of the interval."""
    if selection == "strided":
        every = [i - m * interval for m in range(max_contexts)]
    else:
        every = [i, *[j for j in range(i - 1, -S - 1, -1) if j % interval == 0][: max_contexts - 1]]
    return [j for j in every if j >= -S]


def slot_weights(query: Tensor, key: Tensor, intervals, max_contexts: int, selection: str) -> Tensor:
    """Mean attention weight (H, M) by head and slot, over all queries; absent slots weigh nothing."""
    B, H, T, d = query.shape
    S = key.shape[2] - T
    total = torch.zeros(H, max_contexts)
    for b in range(B):
        for h in range(H):
            for i in range(T):
                slots = [S + j for j in slots_of(i, S, intervals[h], max_contexts, selection)]
                total[h, : len(slots)] += (key[b, h, slots] @ query[b, h, i] / math.sqrt(d)).softmax(dim=0)
    return total / (B * T)


def transformer_layers(model, embeddings: Tensor, window: int | None, begun: bool = False) -> Tensor:
    """Final states (T, D) of a transformer over a whole text (T, D), layer after layer; `begun` is after the first."""
    hidden, pre = embeddings, model.recipe.norm == "pre"
    for number, layer in list(enumerate((model, *model.deeper)))[begun:]:
        normalised = layer.attention.norm(hidden) if pre else hidden
        found = token_attention(layer.attention, normalised if number else hidden, window, normalised, hidden)
        changed = layer.ffn.down(F.gelu(layer.ffn.up(layer.ffn.norm(found) if pre else found)))
        hidden = found + (changed if pre else layer.ffn.norm(changed))
    return hidden


def token_attention(layer, embeddings: Tensor, window: int | None, asking=None, onto=None) -> Tensor:
    """One attention layer of a transformer over a text (T, D), token by token, rotary angles as complex numbers.

    `asking` (T, D) is what queries are made of, `onto` (T, D) what is added to, where they are not the text itself.
    """
    asking, onto = (embeddings if x is None else x for x in (asking, onto))
    T, D = embeddings.shape
    H, d = layer.heads, D // layer.heads

    def turned(x: Tensor, position: int) -> Tensor:
        pairs = torch.complex(x[..., : d // 2], x[..., d // 2 :])
        angles = torch.tensor([position * 10_000.0 ** (-2 * j / d) for j in range(d // 2)])
        pairs = pairs * torch.polar(torch.ones(d // 2), angles)
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    rows = []
    for t in range(T):
        seen = range(max(0, t - window + 1) if window else 0, t + 1)
        query = turned(layer.query(asking[t]).view(H, d), t)
        key = torch.stack([turned(layer.key(embeddings[j]).view(H, d), j) for j in seen])
        value = torch.stack([layer.value(embeddings[j]).view(H, d) for j in seen])
        weights = (torch.einsum("hd,jhd->hj", query, key) / math.sqrt(d)).softmax(dim=-1)
        mixed = torch.einsum("hj,jhd->hd", weights, value).flatten()
        both = onto[t] + layer.output(mixed)
        rows.append(both if layer.residual == "pre" else layer.norm(both))
    return torch.stack(rows)


def full_logit_loss(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood (N,) from the whole N×V matrix of logits."""
    return F.cross_entropy(hidden @ table.T, targets, reduction="none")


def effective_rank_by_svd(contexts: Tensor) -> float:
    """exp(entropy of the normalised singular values) / C, from the singular value decomposition."""
    singular = torch.linalg.svdvals(contexts.double())
    singular = torch.cat([singular, singular.new_zeros(contexts.shape[1] - len(singular))])
    if singular.sum() == 0:
        return 0.0
    share = singular / singular.sum()
    entropy = -sum(float(p) * math.log(float(p)) for p in share if p > 0)
    return math.exp(entropy) / contexts.shape[1]


def oacd_from_formula(contexts: Tensor, centroid_weight: float) -> Tensor:
    """-sqrt(sum of squared distances to the mean) / n + weight * |mean|²."""
    n = len(contexts)
    mean = sum(contexts) / n
    squares = sum(((row - mean) ** 2).sum() for row in contexts)
    return -(squares**0.5) / n + centroid_weight * (mean**2).sum()


def convergence_from_formula(current: Tensor, previous: Tensor, threshold: float) -> float:
    """Share of rows whose mean squared difference is below the threshold, row by row."""
    moved = [float(((a - b) ** 2).mean()) < threshold for a, b in zip(current, previous, strict=True)]
    return sum(moved) / len(moved)


def step_by_step_nll(model, tokens: Tensor) -> Tensor:
    """Losses (N-1,) of a stream, one token at a time: each context from the one before, attention over a plain list."""
    context = torch.zeros(model.encoder.context_dim)
    contexts, losses = [], []
    for now, following in itertools.pairwise(tokens):
        embedding = F.layer_norm(model.embedding.weight[now], (len(model.embedding.weight[now]),))
        context = model.encoder(context, embedding)
        contexts.append(context)
        hidden = embedding
        for layer in (model, *model.deeper):
            attention, ffn = layer.attention, layer.ffn
            seen = torch.stack(contexts[::-1][:: attention.intervals[0]][: attention.max_contexts])
            query = attention.query(hidden).view(attention.heads, -1)
            key, value = (part(seen).view(len(seen), attention.heads, -1) for part in (attention.key, attention.value))
            weights = (torch.einsum("hd,mhd->hm", query, key) / math.sqrt(query.shape[1])).softmax(dim=-1)
            mixed = torch.einsum("hm,mhd->hd", weights, value).flatten()
            hidden = attention.norm(hidden + attention.output(mixed))
            hidden = hidden + ffn.norm(ffn.down(F.gelu(ffn.up(hidden))))
        losses.append(F.cross_entropy(model.embedding.weight @ hidden, following))
    return torch.stack(losses)


def mixed_probabilities(
    output, hidden: Tensor, table: Tensor, contexts: Tensor, tokens: Tensor, t: int, trigram, own: int | None = None
):
    """p (V,) after position t of a text with contexts (N, C) and tokens (N,), from its final state: by the formula.

    Tokens from `own` on are the writing model's own words: not pointed at, which takes its part of the pointer's share.
    """
    pointer, gate, state = output.pointer, output.gate, output.norm(hidden)
    past = [i for i in range(max(0, t - pointer.window), t) if own is None or i + 1 < own]
    evidence, voices = [], []
    for h in range(pointer.heads):
        query = contexts[t] @ pointer.from_context[h] + pointer.norm(state) @ pointer.from_state[h]
        scores = [query @ (contexts[i] @ pointer.key[h]) - pointer.recency[h] * math.log(t - i) for i in past]
        p = torch.zeros(len(table))
        for i, score in zip(past, scores, strict=True):
            p[tokens[i + 1]] += (score - torch.stack(scores).logsumexp(0)).exp()
        voices.append(p)
        evidence.append(torch.stack(scores).logsumexp(0).clamp_min(-20) / 10 if scores else torch.tensor(-2.0))
    if pointer.value is not None:
        embeddings = torch.stack([F.layer_norm(row, row.shape) for row in table])
        believed = 1 if own is None else len(past) / pointer.window
        state = state + believed * pointer.value(torch.cat([p @ embeddings for p in voices]))
    voices.insert(0, (table @ output.projection(state) + output.bias).softmax(dim=0))
    if output.ngram is not None:
        before = int(tokens[t - 1]) if t else len(table)
        p = [float(trigram.conditional(before, int(tokens[t]), w)) for w in range(len(table))]
        voices.append(torch.tensor(p))
        evidence += torch.tensor(trigram.handed_down(before, int(tokens[t]))).float()
    chosen = gate.linear.weight @ torch.cat([gate.norm(state), torch.stack(evidence)]) + gate.linear.bias
    if not past:
        chosen[1 : 1 + pointer.heads] = -torch.inf
    elif own is not None:
        chosen[1 : 1 + pointer.heads] += math.log(len(past) / pointer.window)
    return sum(share * p for share, p in zip(chosen.softmax(dim=0), voices, strict=True))
