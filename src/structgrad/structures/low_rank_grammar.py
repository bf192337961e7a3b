"""Trees of a grammar whose rules are products of three factors."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from structgrad.algorithms.eager import refuse
from structgrad.algorithms.hypergraph import ONE, ZERO, Builder, Hypergraph
from structgrad.common.ranges import check_count
from structgrad.structures import reading as readings
from structgrad.structures.constituency import binary_trees
from structgrad.structures.family_dynamic_programs import Derivations, last
from structgrad.structures.grammar import of_lengths, spans, where_halves_meet, whole
from structgrad.structures.layout import Layout


class LowRankGrammar(Derivations):
    """Trees of a grammar in Chomsky form whose rules have low rank (Cohen et al. 2013; Yang et al.
    2021).

    The weight of a rule ``A -> B C`` is ``sum_r exp(head[A, r] + left[B, r] + right[C, r])``. A
    tree says which symbol every span has and which r rewrites each span of several words. Symbols
    and spans are those of :class:`~structgrad.structures.Grammar`, and ``log_partition`` is that of
    a grammar with the weights above.

    Parts are ``[n, n, F]`` with ``F = (N + 2 S) r + P``. For the words i to j, both included, there
    are four kinds:

    - ``[i, j, A r + q]``, i < j: symbol A, rewritten by q;
    - ``[i, j, N r + B r + q]``: symbol B, as the left half of a span that q rewrites;
    - ``[i, j, (N + S) r + C r + q]``: symbol C, as the right half of a span that q rewrites;
    - ``[i, i, (N + 2 S) r + p]``: preterminal p over word i.

    Every oracle is O(n^3 r + n^2 S r) an example, in place of O(n^3 N^2 + n^2 N S^2).

    Args:
        nonterminals: N, at least 1.
        preterminals: P, at least 1.
        rank: r, at least 1.

    Raises:
        TypeError: for sizes that are not whole numbers.
        ValueError: for sizes below 1; from every oracle for scores of another shape, or (eager CPU
            code) if an example has no tree.
    """

    def __init__(self, nonterminals: int, preterminals: int, rank: int) -> None:
        check_count("nonterminals", nonterminals)
        check_count("preterminals", preterminals)
        check_count("rank", rank)
        self.nonterminals, self.preterminals, self.rank = nonterminals, preterminals, rank
        self.layout = Layout("anchored factors", ("n", "n", "F"))

    @property
    def symbols(self) -> int:
        """S, the number of symbols."""
        return self.nonterminals + self.preterminals

    def shape(self, n: int) -> tuple[int, ...]:
        """The shape for n words."""
        return (n, n, (self.nonterminals + 2 * self.symbols) * self.rank + self.preterminals)

    def check(self, scores: Tensor, mask: Tensor | None = None) -> None:
        """The checks of every structure; F must also be that of the structure."""
        self.layout.check(scores)
        if scores.shape[-1] != self.shape(0)[-1]:
            raise ValueError(
                f"scores of anchored factors of {self} have shape [..., n, n, {self.shape(0)[-1]}]; "
                f"got {list(scores.shape)}"
            )
        super().check(scores, mask)

    def parts(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Several words have nonterminals, one word has preterminals and no head."""
        word, several = _kinds(self.nonterminals, self.preterminals, self.rank)
        kinds = spans(scores, torch.from_numpy(word))
        several_too = torch.from_numpy(several).to(scores.device)
        diagonal = torch.eye(scores.shape[-2], dtype=torch.bool, device=scores.device)[..., None]
        return super().parts(scores, mask) & kinds & (diagonal | several_too)

    def scores(
        self,
        head: Tensor,
        left: Tensor,
        right: Tensor,
        emissions: Tensor,
        roots: Tensor,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Scores of anchored factors.

        Args:
            head: ``[*batch, N, r]``, or broadcastable to it.
            left: ``[*batch, S, r]``, or broadcastable to it.
            right: ``[*batch, S, r]``, or broadcastable to it.
            emissions: scores of word i given a preterminal, ``[*batch, n, P]``.
            roots: scores of the nonterminal over the whole sentence, ``[*batch, N]`` or
                broadcastable to it.
            lengths: int64 ``[*batch]``; None: n words each.

        Returns:
            ``[*batch, n, n, F]``, differentiable in all five. Examples shorter than n also need a
            mask.
        """
        n, batch = emissions.shape[-2], emissions.shape[:-2]

        def everywhere(factor: Tensor) -> Tensor:
            return factor.flatten(-2)[..., None, None, :].expand(*batch, n, n, factor.shape[-2] * factor.shape[-1])

        top = whole(emissions, lengths)[..., None] * roots.repeat_interleave(self.rank, -1)[..., None, None, :]
        words = emissions[..., :, None, :].expand(*batch, n, n, self.preterminals)
        return torch.cat([everywhere(head) + top, everywhere(left), everywhere(right), words], -1)

    def rules(self, head: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Log-weights of the rules: ``[*batch, N, S, S]``, in the form that
        :class:`~structgrad.structures.Grammar` takes.
        """
        return (head[..., :, None, None, :] + left[..., None, :, None, :] + right[..., None, None, :, :]).logsumexp(-1)

    def labels(self, vertex: Tensor) -> Tensor:
        """The symbol over every span of a vertex ``[*batch, n, n, F]``: int64 ``[*batch, n, n]``,
        -1 for no span.

        Nonterminals are 0 ... N - 1, preterminals N ... S - 1.
        """
        heads = vertex[..., : self.nonterminals * self.rank] > 0
        words = vertex[..., vertex.shape[-1] - self.preterminals :] > 0
        symbol = torch.where(heads.any(-1), heads.int().argmax(-1) // self.rank, -1)
        return torch.where(words.any(-1), self.nonterminals + words.int().argmax(-1), symbol)

    def read(self, vertex: Tensor) -> Tensor:
        """The spans (first word, last word, symbol, rank): int64 ``[*batch, m, 4]``, -1 after the
        last one.

        The rank is the r that rewrites the span, -1 for a single word. Outer spans come before
        inner ones, and left ones before right ones. Symbols are those of :meth:`labels`.
        """
        on = vertex.detach() > 0
        heads = on[..., : self.nonterminals * self.rank]
        symbols = self.labels(vertex.detach())
        spans = readings.spans_of(symbols >= 0)
        ranks = torch.where(heads.any(-1), heads.int().argmax(-1) % self.rank, -1)
        return torch.cat([spans, *(readings.at_spans(a, spans)[..., None] for a in (symbols, ranks))], -1)

    def _entries(self, reading: Tensor, shape: torch.Size) -> Tensor:
        spans = readings.outer_first(reading, shape[0])
        start, end, symbol, rank = spans.unbind(-1)
        readings.in_range(symbol, self.symbols, "symbols")
        readings.in_range(rank, self.rank, "ranks")
        several, present = end > start, start >= 0
        wrong = present & ((several != (symbol < self.nonterminals)) | (several != (rank >= 0)))
        refuse(wrong.any(-1), "has words with a nonterminal or a rank, or longer spans without")
        children = readings.halves(spans)
        sides = [self.nonterminals, self.nonterminals + self.symbols]
        of_words = sides[1] * self.rank + self.symbols * self.rank + symbol - self.nonterminals
        own = torch.where(several, symbol * self.rank + rank, of_words)
        found = [readings.entries(torch.where(present[..., None], torch.stack([start, end, own], -1), -1), shape)]
        for side, child in zip(sides, children, strict=True):
            at = child.clamp_min(0)
            i, j, below = (a.gather(-1, at) for a in (start, end, symbol))
            inside = torch.stack([i, j, (side + below) * self.rank + rank], -1)
            inside = torch.where(child[..., None] < -1, -2, inside)
            found.append(readings.entries(torch.where((several & present)[..., None], inside, -1), shape))
        return torch.cat(found, -1)

    def covered(self, vertex: Tensor) -> Tensor:
        return readings.covered_words(vertex)

    def _hypergraph(self, shape: torch.Size) -> Hypergraph:
        return _graph(shape[0], self.nonterminals, self.preterminals, self.rank)

    def _size(self, exists: Tensor) -> Tensor:
        return last(exists.any(-1).any(-2))

    def enumerate(self, *shape: int) -> Tensor:
        """All trees with all symbols and ranks: ``[V, n, n, F]``."""
        self.check_shape_listable(*shape)
        n, rank = shape[0], self.rank
        upper, symbols = self.nonterminals, self.symbols
        found = []
        for tree in binary_trees(0, n - 1) if n else [[]]:
            split = {span: k for k, span in enumerate(tree)}
            choices = [
                list(itertools.product(range(upper), range(rank))) if i < j else [(s, 0) for s in range(upper, symbols)]
                for i, j in tree
            ]
            for chosen in itertools.product(*choices):
                vertex = torch.zeros(shape, dtype=torch.float64)
                for (i, j), (symbol, q) in zip(tree, chosen, strict=True):
                    if i == j:
                        vertex[i, i, (upper + 2 * symbols) * rank + symbol - upper] = 1
                        continue
                    meet = where_halves_meet(split, i, j)
                    vertex[i, j, symbol * rank + q] = 1
                    vertex[i, meet, (upper + chosen[split[i, meet]][0]) * rank + q] = 1
                    vertex[meet + 1, j, (upper + symbols + chosen[split[meet + 1, j]][0]) * rank + q] = 1
                found.append(vertex)
        return torch.stack(found)


def _kinds(nonterminals: int, preterminals: int, rank: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """The entries of a single word and the entries of several words: bool ``[F]`` each."""
    upper = np.arange(nonterminals + preterminals) < nonterminals
    halves = np.concatenate([upper, upper]).repeat(rank)
    head, emission = np.ones(nonterminals * rank, bool), np.ones(preterminals, bool)
    return np.concatenate([~head, ~halves, emission]), np.concatenate([head, halves, ~emission])


@functools.lru_cache(maxsize=32)
def _graph(n: int, nonterminals: int, preterminals: int, rank: int) -> Hypergraph:
    """Built bottom up, all spans of a width at a time. Size: words of an example."""
    builder, symbols = Builder(), nonterminals + preterminals
    count = (nonterminals + 2 * symbols) * rank + preterminals
    ranks = np.arange(rank)
    tree = np.full((n, n, symbols), ZERO)
    half = np.full((2, n, n, rank), ZERO)  # left and right
    for width in range(n):
        i = np.arange(n - width)
        j = i + width
        span = ((i * n + j) * count)[:, None, None]
        if width:
            own = np.arange(nonterminals)
            meet = i[:, None] + np.arange(width)
            left, right = half[0, i[:, None], meet], half[1, meet + 1, j[:, None]]  # [spans, places, r]
            shape = (len(i) * rank, width)
            pairs = builder.level(left.swapaxes(1, 2).reshape(shape), right.swapaxes(1, 2).reshape(shape))
            tails = pairs.reshape(len(i), 1, rank)
            parts = span + own[:, None] * rank + ranks
        else:
            own = np.arange(nonterminals, symbols)
            tails = np.full((1, 1, 1), ONE)
            parts = span + (nonterminals + 2 * symbols) * rank + (own - nonterminals)[:, None]
        shape = (len(i) * len(own), parts.shape[-1])
        nodes = builder.level(np.broadcast_to(tails, parts.shape).reshape(shape), ONE, parts.reshape(shape))
        tree[i[:, None], j[:, None], own] = nodes.reshape(len(i), len(own))
        for side in (0, 1):
            parts = span + (nonterminals + side * symbols + own) * rank + ranks[:, None]  # [spans, r, symbols]
            shape = (len(i) * rank, len(own))
            tails = np.broadcast_to(tree[i, j][:, None, own], parts.shape)
            half[side, i, j] = builder.level(tails.reshape(shape), ONE, parts.reshape(shape)).reshape(len(i), rank)
    return builder.build(of_lengths(builder, tree, nonterminals))
