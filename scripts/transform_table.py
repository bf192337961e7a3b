"""Write ``docs/transforms.md``: every structure under ``torch.func``, ``torch.compile`` and modes
of torch.

Every cell is tried: each oracle at a tiny size, against the plain call. An oracle is right, or
refuses in one line.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from structgrad.common.private import compiler_errors
from structgrad.structures import Structure, Trace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.cases import CASES as REGISTERED  # noqa: E402

TARGET = ROOT / "docs" / "transforms.md"

INTRODUCTION = """\
# Under torch.func, torch.compile and modes of torch

Written by `scripts/transform_table.py`, which tries every cell on the CPU at a tiny size; do not
edit. `all`: every oracle gives the result of the plain call, in value and in derivatives. Otherwise
the cell names the refused oracles; the text below the table explains them. Choices (`argmax`,
`top_k`, `sample`, `trace`) have no derivative, so columns of derivatives leave them out. The number
of vertices of `sparsemap` varies, which `vmap` cannot handle: it is refused under `torch.func` in
one line.

"""

NOTES = """
- **vmap** takes `randomness="different"` for samples. Compiled code sees the examples of `vmap` as one
  more batch dimension (`structgrad.algorithms.transforms`). Derivatives under `torch.func` run in
  plain torch. `vmap` may also be over masks, except of `FactorGraph`, which refuses that.
- **jacobian** is `torch.autograd.functional.jacobian(vectorize=True)`, **hessian**
  `torch.func.hessian`.
- **compile** is tried with `backend="aot_eager"`, with gradients where they exist. Compiled CPU code
  is called through `torch.library` operators. The active-set projection reads values in every step.
  `torch.compile` runs it between two graphs, and `fullgraph=True` refuses it with a message.
- **autocast** to bfloat16 changes nothing, to the last digit.
"""

#: Class -> structure and shape of its scores, those of its first case.
CASES: dict[str, tuple[Structure, tuple[int, ...]]] = {}
for case in REGISTERED.values():
    CASES.setdefault(case.plain.name, (case.plain, case.shape))

Function = Callable[[Tensor], Tensor]
DIFFERENTIABLE = ("log_partition", "marginals", "entropy", "project", "log_prob", "trace_log_prob", "conditional")
CHOICES = ("argmax", "top_k", "sample", "trace")


def function(structure: Structure, shape: tuple[int, ...], oracle: str) -> Function:
    """The oracle as a function of scores ``[*batch, *parts]`` alone."""
    torch.manual_seed(1)
    example = torch.randn(shape, dtype=torch.float64)

    def for_all(given: Tensor, scores: Tensor) -> Tensor:
        return given.expand(*scores.shape[: scores.dim() - len(shape)], *given.shape)

    if oracle == "log_prob":
        vertex = structure.argmax(example)
        return lambda s: structure.log_prob(for_all(vertex, s), s)
    if oracle in ("trace_log_prob", "conditional"):
        trace = structure.trace(example.exp())
        noise = structure.conditional_noise(trace, example)

        def of_trace(s: Tensor) -> Tensor:
            given = Trace(for_all(trace.vertex, s), for_all(trace.choices, s))
            if oracle == "trace_log_prob":
                return structure.trace_log_prob(given, s)
            return structure.conditional(given, s, None, (for_all(noise[0], s), for_all(noise[1], s)))

        return of_trace
    if oracle == "top_k":
        return lambda s: structure.top_k(s, 2)[0]
    if oracle == "trace":
        return lambda s: structure.trace(s.exp()).vertex
    if oracle == "sample":  # with a distribution of one vertex, so that samples can be compared
        return lambda s: structure.sample(1e4 * s)
    return getattr(structure, oracle)  # type: ignore[no-any-return]


def oracles(structure: Structure, mode: str) -> list[str]:
    """The oracles and relaxations of one utility that a mode applies to."""
    relaxed = [r.method for r in structure.relaxations.values() if r.draws is None]
    choices = [] if mode in DERIVATIVES else CHOICES
    return list(dict.fromkeys(o for o in (*DIFFERENTIABLE, *relaxed, *choices) if o in {*structure.oracles, *relaxed}))


def weighted(f: Function) -> Function:
    """A number made of all entries of what the function returns."""

    def scalar(s: Tensor) -> Tensor:
        value = f(s)
        weight = torch.linspace(0, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
        return (weight * value).sum()

    return scalar


def same(found: Tensor, expected: Tensor, **tolerance: float) -> None:
    """Fails unless both are equal up to rounding, or to the tolerance given."""
    torch.testing.assert_close(found, expected, **(tolerance or {"rtol": 1e-6, "atol": 1e-7}))


def _scores(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, batch: int = 3) -> Tensor:
    return torch.randn(batch, *shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def _batch_jacobian(f: Function, s: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(f, s)


def _vmap(f: Function, s: Tensor) -> None:
    same(torch.func.vmap(f, randomness="different")(s), f(s))


def _vmap_grad(f: Function, s: Tensor) -> None:
    found = torch.func.vmap(torch.func.grad(weighted(f)))(s)
    same(found, torch.stack([torch.autograd.functional.jacobian(weighted(f), x) for x in s]))


def _jacrev(f: Function, s: Tensor) -> None:
    same(torch.func.jacrev(f)(s[0]), _batch_jacobian(f, s[0]))


def _jacfwd(f: Function, s: Tensor) -> None:
    same(torch.func.jacfwd(f)(s[0]), _batch_jacobian(f, s[0]))


def _vectorized(f: Function, s: Tensor) -> None:
    same(torch.autograd.functional.jacobian(f, s[0], vectorize=True), _batch_jacobian(f, s[0]))


def _hessian(f: Function, s: Tensor) -> None:
    same(torch.func.hessian(weighted(f))(s[0]), torch.autograd.functional.hessian(weighted(f), s[0]))


def _compiled(f: Function, s: Tensor, fullgraph: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=fullgraph)
    with torch.no_grad():
        expected = f(s)
    same(compiled(s), expected)
    if f(s.clone().requires_grad_()).requires_grad:
        ours, theirs = (s.clone().requires_grad_() for _ in range(2))
        weight = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).reshape(expected.shape)
        (compiled(ours) * weight).sum().backward()
        (f(theirs) * weight).sum().backward()
        same(ours.grad, theirs.grad)


def _compile(f: Function, s: Tensor) -> None:
    _compiled(f, s, False)


def _fullgraph(f: Function, s: Tensor) -> None:
    _compiled(f, s, True)


def _value_and_grad(f: Function, s: Tensor) -> tuple[Tensor, Tensor | None]:
    s = s.clone().requires_grad_()
    value = f(s)
    if not value.requires_grad:
        return value, None
    return value, torch.autograd.grad(weighted(lambda _: value)(s), s)[0]


def _autocast(f: Function, s: Tensor) -> None:
    s = s.float()
    expected, slope = _value_and_grad(f, s)
    with torch.autocast("cpu", torch.bfloat16):
        found, moved = _value_and_grad(f, s)
    same(found, expected, rtol=0.0, atol=0.0)
    if slope is not None and moved is not None:
        same(moved, slope, rtol=0.0, atol=0.0)


def _float64(f: Function, s: Tensor) -> None:
    wide, slope = _value_and_grad(f, s)
    narrow, moved = _value_and_grad(f, s.float())
    assert wide.dtype == torch.float64
    same(narrow.double(), wide, rtol=1e-4, atol=1e-4)
    if slope is not None and moved is not None:
        same(moved.double(), slope, rtol=1e-3, atol=1e-3)


def _inference(f: Function, s: Tensor) -> None:
    expected = f(s)
    with torch.inference_mode():
        same(f(s), expected)
        same(f(s.clone()), expected)


MODES: dict[str, Callable[[Function, Tensor], None]] = {
    "vmap": _vmap,
    "vmap of grad": _vmap_grad,
    "jacrev": _jacrev,
    "jacfwd": _jacfwd,
    "jacobian": _vectorized,
    "hessian": _hessian,
    "compile": _compile,
    "compile, fullgraph": _fullgraph,
    "autocast": _autocast,
    "float64": _float64,
    "inference mode": _inference,
}
DERIVATIVES = {"vmap of grad", "jacrev", "jacfwd", "jacobian", "hessian"}


@functools.cache
def attempt(name: str, oracle: str, mode: str) -> str:
    """An empty string if it is right, otherwise the line with which it is refused.

    Raises:
        AssertionError: for a wrong number, or a refusal without a message of ours.
    """
    if mode == "compile" and not attempt(name, oracle, "compile, fullgraph"):
        return ""  # what is one graph is some
    structure, shape = CASES[name]
    f = function(structure, shape, oracle)
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            MODES[mode](f, _scores(shape))
    except (NotImplementedError, *compiler_errors()) as refusal:
        return str(refusal)
    return ""


def cell(name: str, mode: str) -> str:
    """The cell of a structure and a mode."""
    refused = [o for o in oracles(CASES[name][0], mode) if attempt(name, o, mode)]
    return "all" if not refused else "not " + ", ".join(f"`{o}`" for o in refused)


def row(name: str) -> str:
    """The row of a structure."""
    return f"| {name} | {' | '.join(cell(name, mode) for mode in MODES)} |"


def table() -> str:
    """The whole file."""
    lines = [f"| structure | {' | '.join(MODES)} |", "|---|" + ":-:|" * len(MODES)]
    lines += [row(name) for name in CASES]
    return INTRODUCTION + "\n".join(lines) + "\n" + NOTES


if __name__ == "__main__":
    TARGET.write_text(table())
