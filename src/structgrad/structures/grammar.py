"""Trees of a grammar with rules."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Container

import numpy as np
import torch
from torch import Tensor

from structgrad.algorithms.hypergraph import ONE, ZERO, Builder, Hypergraph, Index
from structgrad.common.ranges import check_count
from structgrad.structures import reading as readings
from structgrad.structures.constituency import binary_trees
from structgrad.structures.family_dynamic_programs import Derivations, last
from structgrad.structures.layout import Layout


class Grammar(Derivations):
    """Trees of a context-free grammar in Chomsky form over n words (Baker 1979; Eisner 2016).

    There are N nonterminals and P preterminals, ``S = N + P`` symbols, nonterminals first. A rule
    ``A -> B C`` rewrites a nonterminal A into two symbols; a preterminal stands for one word. A
    tree has a nonterminal over every span of several words and a preterminal over every single
    word. A sentence of one word has one preterminal and no rule.

    Parts are *anchored* rules ``[n, n, R]`` with ``R = N S S``. For i < j, ``[i, j, (A S + B) S +
    C]`` concerns the words i to j, both included. It says that they have symbol A, rewritten by the
    rule ``A -> B C``. The point where the two halves meet follows from the other parts. On the
    diagonal, ``[i, i, p]`` with p < P says that word i has preterminal p. A word that no existing
    part covers is absent, and absent words are the last ones.

    :meth:`scores` makes anchored scores from the scores of a grammar, whose rules have one score
    wherever they are used. The gradient of ``log_partition`` in these is the expected number of
    uses of each rule.

    Args:
        nonterminals: N, at least 1.
        preterminals: P, at least 1.

    Raises:
        TypeError: for numbers of symbols that are not whole.
        ValueError: if there are no symbols; from every oracle for scores of another shape, or
            (eager CPU code) if an example has no tree.
    """

    def __init__(self, nonterminals: int, preterminals: int) -> None:
        check_count("nonterminals", nonterminals)
        check_count("preterminals", preterminals)
        self.nonterminals, self.preterminals = nonterminals, preterminals
        self.layout = Layout("anchored rules", ("n", "n", "R"))

    @property
    def symbols(self) -> int:
        """S, the number of symbols."""
        return self.nonterminals + self.preterminals

    def shape(self, n: int) -> tuple[int, ...]:
        """The shape for n words."""
        return (n, n, self.nonterminals * self.symbols**2)

    def check(self, scores: Tensor, mask: Tensor | None = None) -> None:
        """The checks of every structure; R must also be that of the structure."""
        self.layout.check(scores)
        if scores.shape[-1] != self.shape(0)[-1]:
            raise ValueError(
                f"scores of anchored rules of {self} have shape [..., n, n, {self.shape(0)[-1]}]; "
                f"got {list(scores.shape)}"
            )
        super().check(scores, mask)

    def parts(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Rules over several words, preterminals over one."""
        return super().parts(scores, mask) & spans(scores, torch.arange(scores.shape[-1]) < self.preterminals)

    def scores(self, rules: Tensor, emissions: Tensor, roots: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Scores of anchored rules.

        Args:
            rules: scores of ``A -> B C``, ``[*batch, N, S, S]`` or broadcastable to it.
            emissions: scores of word i given a preterminal, ``[*batch, n, P]``.
            roots: scores of the nonterminal over the whole sentence, ``[*batch, N]`` or
                broadcastable to it.
            lengths: int64 ``[*batch]``; None: n words each.

        Returns:
            ``[*batch, n, n, R]``, differentiable in all three. Examples shorter than n also need a
            mask.
        """
        n, count = emissions.shape[-2], self.shape(0)[-1]
        anchored = rules.flatten(-3)[..., None, None, :].expand(*emissions.shape[:-2], n, n, count)
        words = torch.nn.functional.pad(emissions, (0, count - self.preterminals))
        diagonal = torch.eye(n, dtype=torch.bool, device=emissions.device)[..., None]
        of_root = roots.repeat_interleave(self.symbols**2, -1)[..., None, None, :]
        return torch.where(diagonal, words[..., :, None, :], anchored + whole(emissions, lengths)[..., None] * of_root)

    def labels(self, vertex: Tensor) -> Tensor:
        """The symbol over every span of a vertex ``[*batch, n, n, R]``: int64 ``[*batch, n, n]``,
        -1 for no span.

        Nonterminals are 0 ... N - 1, preterminals N ... S - 1.
        """
        on = vertex > 0
        index = on.int().argmax(-1)
        diagonal = torch.eye(vertex.shape[-2], dtype=torch.bool, device=vertex.device)
        symbol = torch.where(diagonal, self.nonterminals + index, index // self.symbols**2)
        return torch.where(on.any(-1), symbol, -1)

    def read(self, vertex: Tensor) -> Tensor:
        """The spans (first word, last word, symbol): int64 ``[*batch, m, 3]``, -1 after the last
        one.

        Outer spans come before inner ones, and left ones before right ones. Symbols are those of
        :meth:`labels`. The function :func:`brackets` shows them as text.
        """
        spans = readings.spans_of((vertex.detach() > 0).any(-1))
        return torch.cat([spans, readings.at_spans(self.labels(vertex.detach()), spans)[..., None]], -1)

    def _entries(self, reading: Tensor, shape: torch.Size) -> Tensor:
        spans = readings.outer_first(reading, shape[0])
        start, end, symbol = spans.unbind(-1)
        readings.in_range(symbol, self.symbols, "symbols")
        left, right = readings.halves(spans)
        of_left, of_right = symbol.gather(-1, left.clamp_min(0)), symbol.gather(-1, right.clamp_min(0))
        rule = torch.where(start < end, (symbol * self.symbols + of_left) * self.symbols + of_right, 0)
        upper = symbol < self.nonterminals
        rule = torch.where(start < end, torch.where(upper, rule, -1), symbol - self.nonterminals)
        at = torch.stack([start, end, torch.where((left < -1) | (rule < 0), -2, rule)], -1)
        return readings.entries(torch.where(start[..., None] < 0, -1, at), shape)

    def covered(self, vertex: Tensor) -> Tensor:
        return readings.covered_words(vertex)

    def counts(self, vertex: Tensor) -> Tensor:
        """How often every rule is used: ``[*batch, N, S, S]``; for marginals, the expected number
        of uses.
        """
        n = vertex.shape[-2]
        apart = torch.ones(n, n, dtype=torch.bool, device=vertex.device).triu(1)[..., None]
        used = torch.where(apart, vertex, 0.0).sum((-3, -2))
        return used.reshape(*used.shape[:-1], self.nonterminals, self.symbols, self.symbols)

    def _hypergraph(self, shape: torch.Size) -> Hypergraph:
        return _graph(shape[0], self.nonterminals, self.preterminals)

    def _size(self, exists: Tensor) -> Tensor:
        return last(exists.any(-1).any(-2))

    def enumerate(self, *shape: int) -> Tensor:
        """All trees with all symbols: ``[V, n, n, R]``."""
        self.check_shape_listable(*shape)
        n, symbols = shape[0], self.symbols
        found = []
        for tree in binary_trees(0, n - 1) if n else [[]]:
            choices = [range(self.nonterminals) if i < j else range(self.nonterminals, symbols) for i, j in tree]
            split = {span: k for k, span in enumerate(tree)}
            for chosen in itertools.product(*choices):
                vertex = torch.zeros(shape, dtype=torch.float64)
                for (i, j), symbol in zip(tree, chosen, strict=True):
                    if i == j:
                        vertex[i, i, symbol - self.nonterminals] = 1
                        continue
                    meet = where_halves_meet(split, i, j)
                    left, right = chosen[split[i, meet]], chosen[split[meet + 1, j]]
                    vertex[i, j, (symbol * symbols + left) * symbols + right] = 1
                found.append(vertex)
        return torch.stack(found)


def spans(scores: Tensor, of_words: Tensor) -> Tensor:
    """Which entries of the last dimension of ``[n, n, R]`` belong to a span: bool.

    Args:
        scores: ``[*batch, n, n, R]``; only shape and device are used.
        of_words: bool ``[R]``, the entries of a single word; a span of several words has all
            entries.
    """
    together = torch.ones(scores.shape[-3:-1], dtype=torch.bool, device=scores.device)
    word = torch.eye(scores.shape[-2], dtype=torch.bool, device=scores.device)
    return (together.triu(1)[..., None]) | (word[..., None] & of_words.to(scores.device))


def whole(emissions: Tensor, lengths: Tensor | None) -> Tensor:
    """1 at the span of the whole sentence, 0 elsewhere: ``[*batch, n, n]`` (or ``[n, n]``).

    The sizes are those of emissions ``[*batch, n, P]`` and lengths ``[*batch]``.
    """
    n = emissions.shape[-2]
    end = torch.arange(n, device=emissions.device)
    at = end == (n if lengths is None else lengths[..., None]) - 1
    return ((end == 0)[:, None] & at[..., None, :]).to(emissions.dtype)


def where_halves_meet(tree: Container[tuple[int, int]], i: int, j: int) -> int:
    """The last word of the left half of a span (i, j) in a tree, which is given by its spans."""
    return next(k for k in range(i, j) if (i, k) in tree and (k + 1, j) in tree)


def of_lengths(builder: Builder, tree: Index, nonterminals: int) -> list[int]:
    """The goals of sentences of 0 to n words: one preterminal over a single word, a nonterminal
    over several.

    Args:
        builder: receives their nodes.
        tree: ``[n, n, S]``, the nodes of symbols over spans.
        nonterminals: how many of the symbols are nonterminals.
    """
    if not len(tree):
        return [ONE]
    return [ONE, *builder.level(tree[0, :1, nonterminals:]), *builder.level(tree[0, 1:, :nonterminals])]


@functools.lru_cache(maxsize=32)
def _graph(n: int, nonterminals: int, preterminals: int) -> Hypergraph:
    """Built bottom up, all spans of a width at a time. Size: words of an example."""
    builder, symbols = Builder(), nonterminals + preterminals
    count = nonterminals * symbols**2
    tree = np.full((n, n, symbols), ZERO)
    upper, lower = np.arange(nonterminals), np.arange(nonterminals, symbols)

    def rules(i: Index, j: Index, left: Index, right: Index) -> Index:
        """The parts ``[spans, N, pairs]`` of the rules with these halves."""
        rule = (upper[:, None] * symbols + left) * symbols + right
        parts: Index = ((i * n + j) * count)[:, None, None] + rule
        return parts

    for width in range(n):
        i = np.arange(n - width)
        j = i + width
        if not width:
            tree[i, i, nonterminals:] = builder.level(
                np.full((n * preterminals, 1), ONE),
                ONE,
                (((i * n + i) * count)[:, None] + np.arange(preterminals)).reshape(-1, 1),
            ).reshape(n, preterminals)
            continue
        # Both halves, or one of them, have one word: the halves meet in one place.
        kinds = [(lower, lower, i)] if width == 1 else [(lower, upper, i), (upper, lower, j - 1)]
        tails: list[tuple[Index, Index, Index]] = []
        for of_left, of_right, meet in kinds:
            b, c = (a.flatten() for a in np.meshgrid(of_left, of_right, indexing="ij"))
            tails.append((tree[i, meet][:, b], tree[meet + 1, j][:, c], rules(i, j, b, c)))
        if width > 2:  # both have several words: add up the places where they may meet
            b, c = (a.flatten() for a in np.meshgrid(upper, upper, indexing="ij"))
            meet = i[:, None] + np.arange(1, width - 1)
            left, right = tree[i[:, None], meet][:, :, b], tree[meet + 1, j[:, None]][:, :, c]
            shape = (len(i) * len(b), width - 2)
            pairs = builder.level(left.swapaxes(1, 2).reshape(shape), right.swapaxes(1, 2).reshape(shape))
            tails.append((pairs.reshape(len(i), len(b)), np.full((len(i), len(b)), ONE), rules(i, j, b, c)))
        left, right = (np.concatenate([t[k] for t in tails], -1)[:, None, :] for k in (0, 1))
        parts = np.concatenate([t[2] for t in tails], -1)
        shape = (len(i) * nonterminals, parts.shape[-1])
        left, right = (np.broadcast_to(a, parts.shape).reshape(shape) for a in (left, right))
        tree[i, j, :nonterminals] = builder.level(left, right, parts.reshape(shape)).reshape(len(i), nonterminals)
    return builder.build(of_lengths(builder, tree, nonterminals))
