"""Alignments with blanks, grammars, hidden Markov models, distances and mixed variables:
``python -m benchmarks.sequences``.

Each is measured beside the library that has it: torch's CTC loss, torch-struct's ``SentCFG`` and
``LinearChainCRF``, and torch's distributions. Ours and theirs are measured in the same run with the
same threads; numbers are medians, float32. Log-partitions include the gradient in what a model
gives: log-probabilities of symbols, scores of rules, of transitions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmarks.harness import Row, measure, report, settings
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, RelaxedBernoulli, kl_divergence
from torch.nn import functional as F

from structgrad.estimators import HardConcrete, HardKuma
from structgrad.structures import Ctc, Grammar, HiddenMarkov, LinearChain, LowRankGrammar, OneHot, Subset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch_struct

Call = Callable[[], Any]


def gradient(function: Callable[..., Tensor], *inputs: Tensor) -> Call:
    """The sum of a function's values with its gradient in all inputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    return lambda: torch.autograd.grad(function(*leaves).sum(), leaves)


def pair(what: str, size: str, opponent: str, ours: Call, theirs: Call) -> Row:
    """One line."""
    return Row(what, size, measure(ours, repeats=7, warmup=2), opponent, measure(theirs, repeats=7, warmup=2))


def alignments(batch: int = 16, frames: int = 200, labels: int = 40, symbols: int = 30) -> list[Row]:
    """CTC beside torch's loss."""
    logits = torch.randn(batch, frames, symbols)
    targets = torch.randint(1, symbols, (batch, labels))
    lengths = torch.full((batch,), frames), torch.full((batch,), labels)

    def ours(logits: Tensor) -> Tensor:
        return -Ctc().log_partition(*Ctc().scores(logits.log_softmax(-1), targets))

    def theirs(logits: Tensor) -> Tensor:
        return F.ctc_loss(logits.log_softmax(-1).transpose(0, 1), targets, *lengths, reduction="none")

    size = f"B {batch}, T {frames}, U {labels}"
    return [pair("Ctc loss with gradient", size, "torch ctc_loss", gradient(ours, logits), gradient(theirs, logits))]


def grammars(batch: int = 8, n: int = 16, nonterminals: int = 4, preterminals: int = 6) -> list[Row]:
    """Grammars beside torch-struct's."""
    grammar, symbols = Grammar(nonterminals, preterminals), nonterminals + preterminals
    rules = torch.randn(batch, nonterminals, symbols, symbols)
    emissions, roots = torch.randn(batch, n, preterminals), torch.randn(batch, nonterminals)
    lengths = torch.full((batch,), n)

    def ours(rules: Tensor, emissions: Tensor, roots: Tensor) -> Tensor:
        return grammar.log_partition(grammar.scores(rules, emissions, roots))

    def theirs(rules: Tensor, emissions: Tensor, roots: Tensor) -> Tensor:
        partition: Tensor = torch_struct.SentCFG((emissions, rules, roots), lengths).partition
        return partition

    low_rank = LowRankGrammar(nonterminals, preterminals, 4)
    factors = [torch.randn(batch, rows, 4) for rows in (nonterminals, symbols, symbols)]

    def low(*inputs: Tensor) -> Tensor:
        return low_rank.log_partition(low_rank.scores(*inputs))

    def dense(head: Tensor, left: Tensor, right: Tensor, emissions: Tensor, roots: Tensor) -> Tensor:
        return theirs(low_rank.rules(head, left, right), emissions, roots)

    size = f"B {batch}, n {n}, N {nonterminals}, P {preterminals}"
    name, inputs = "torch-struct SentCFG", (rules, emissions, roots)
    factored = (*factors, emissions, roots)
    return [
        pair("Grammar log-partition with gradient", size, name, gradient(ours, *inputs), gradient(theirs, *inputs)),
        pair("LowRankGrammar, rank 4, with gradient", size, name, gradient(low, *factored), gradient(dense, *factored)),
    ]


def hidden_markov(batch: int = 32, n: int = 50, states: int = 10) -> list[Row]:
    """A hidden Markov model beside torch-struct's chain of the same transitions, and a loop over positions."""
    model = HiddenMarkov(states)
    initial, transition = torch.randn(states).log_softmax(-1), torch.randn(states, states).log_softmax(-1)
    emission = torch.randn(batch, n, states)

    def ours(emission: Tensor) -> Tensor:
        return model.log_partition(model.scores(initial, transition, emission))

    def chain(emission: Tensor) -> Tensor:
        scores = transition.T[None, None] + emission[:, 1:, :, None]  # [..., next, previous], as theirs
        start = torch.cat([(initial + emission[:, :1])[..., None, :], torch.zeros(batch, n - 2, 1, states)], 1)
        partition: Tensor = torch_struct.LinearChainCRF(scores + start).partition
        return partition

    def loop(emission: Tensor) -> Tensor:
        alpha = initial + emission[:, 0]
        for t in range(1, n):
            alpha = (alpha[:, :, None] + transition).logsumexp(1) + emission[:, t]
        return alpha.logsumexp(1)

    torch.testing.assert_close(ours(emission), loop(emission), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours(emission), chain(emission), rtol=1e-4, atol=1e-3)
    size, what = f"B {batch}, n {n}, C {states}", "HiddenMarkov likelihood with gradient"
    return [
        pair(what, size, "torch-struct LinearChainCRF", gradient(ours, emission), gradient(chain, emission)),
        pair(what, size, "loop over positions", gradient(ours, emission), gradient(loop, emission)),
    ]


def distances(batch: int = 256, size: int = 100, n: int = 50, labels: int = 10) -> list[Row]:
    """KL divergences beside those of torch's distributions and torch-struct."""
    p, q = torch.randn(2, batch, size).unbind(0)
    chain, crf = LinearChain(labels), torch_struct.LinearChainCRF
    first, second = torch.randn(2, 32, n - 1, labels, labels).unbind(0)
    categorical = gradient(lambda a, b: kl_divergence(Categorical(logits=a), Categorical(logits=b)), p, q)
    bernoulli = gradient(lambda a, b: kl_divergence(Bernoulli(logits=a), Bernoulli(logits=b)).sum(-1), p, q)
    of_chains = gradient(lambda a, b: crf(a).kl(crf(b)), first, second)
    shape, lengths = f"B {batch}, {size} parts", f"B 32, N {n}, C {labels}"
    return [
        pair("OneHot kl with gradient", shape, "torch Categorical", gradient(OneHot().kl, p, q), categorical),
        pair("Subset kl with gradient", shape, "torch Bernoulli", gradient(Subset().kl, p, q), bernoulli),
        pair(
            "chain kl with gradient",
            lengths,
            "torch-struct LinearChainCRF",
            gradient(chain.kl, first, second),
            of_chains,
        ),
    ]


def mixed(batch: int = 64, size: int = 100) -> list[Row]:
    """Steps of mixed variables, exact KL divergence included, beside a relaxed Bernoulli variable without one."""
    scores, worth = torch.randn(batch, size), torch.randn(size)

    def step(estimator: HardConcrete | HardKuma) -> Call:
        def total(scores: Tensor) -> Tensor:
            estimate = estimator(scores, lambda z, rows: z @ worth)
            loss: Tensor = estimate.surrogate + estimate.kl
            return loss

        return gradient(total, scores)

    def theirs(scores: Tensor) -> Tensor:
        unit = RelaxedBernoulli(torch.tensor(2 / 3), logits=scores).rsample()
        return (1.2 * unit - 0.1).clamp(0, 1) @ worth

    what, shape = "step with exact KL", f"B {batch}, {size} parts"
    opponent = "torch RelaxedBernoulli, clipped, no KL"
    return [
        pair(f"{type(estimator).__name__} {what}", shape, opponent, step(estimator), gradient(theirs, scores))
        for estimator in (HardConcrete(Subset()), HardKuma(Subset()))
    ]


def rows(
    groups: Sequence[Callable[[], list[Row]]] = (alignments, grammars, hidden_markov, distances, mixed),
) -> list[Row]:
    """All lines."""
    return [row for group in groups for row in group()]


def main() -> None:
    """Measure, print, and record if asked to."""
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message=".*arg_constraints.*")
    report("sequences", [row for _ in settings() for row in rows()])


if __name__ == "__main__":
    main()
