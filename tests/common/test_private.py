"""Parts of other libraries that these keep to themselves: a test each, which says what breaks with a new version."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback, ModelCheckpoint
from pytorch_lightning.profilers import PassThroughProfiler
from torch import Tensor, nn
from torch.utils.data import DataLoader

import structgrad
from structgrad.common import private

PACKAGE = Path(structgrad.__file__).parent


def test_every_function_has_a_test_of_its_name() -> None:
    functions = {n.name for n in ast.parse(Path(private.__file__).read_text()).body if isinstance(n, ast.FunctionDef)}
    assert {f"test_{name}" for name in functions} <= set(globals())


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_private_is_used_elsewhere(path: Path) -> None:
    """Private names of other packages: ``torch._C``, ``from torch._dynamo import``, and of their objects by name."""
    if path.name == "private.py":
        return
    tree = ast.parse(path.read_text())
    foreign: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.module.startswith("structgrad") or "._" not in node.module, node.module
        if isinstance(node, ast.Import):
            foreign |= {(a.asname or a.name).split(".")[0] for a in node.names if not a.name.startswith("structgrad")}
    objects = {"trainer", "trial", "study", "storage", "checkpoint", "logger", *foreign}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            root = node.value
            while isinstance(root, ast.Attribute | ast.Call):
                root = root.value if isinstance(root, ast.Attribute) else root.func
            assert not (isinstance(root, ast.Name) and root.id in objects), f"line {node.lineno}: {ast.unparse(node)}"


# --- torch ------------------------------------------------------------------------------------------------------------


def test_is_functorch_tensor() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(private.is_functorch_tensor(x))
        return x

    look(torch.zeros(2))
    torch.func.vmap(look)(torch.zeros(2))
    assert seen == [False, True]


def test_is_batched_gradient() -> None:
    seen = []

    def look(gradient: Tensor) -> Tensor:
        seen.append(private.is_batched_gradient(gradient))
        return gradient

    x = torch.zeros(2, requires_grad=True)
    y = x * 2
    y.register_hook(look)
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert seen == [True, False]


def test_constant_when_traced() -> None:
    """A method that no compiler could trace, of constants."""

    class Table:
        @private.constant_when_traced
        def size(self, n: int) -> int:
            return len(Path(".").resolve().parts) * 0 + n

    table = Table()
    compiled = torch.compile(lambda x: x + table.size(len(x)), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(3)).tolist() == [3.0] * 3


def test_break_graph() -> None:
    def breaks(x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            private.break_graph("it is too long")
        return x + 1

    with pytest.raises(private.compiler_errors()) as refused:
        torch.compile(breaks, backend="eager", fullgraph=True)(torch.zeros(1))
    assert private.reason_of_break(refused.value) == "it is too long"
    torch.compiler.reset()
    assert torch.compile(breaks, backend="eager")(torch.zeros(1)).item() == 1


def test_reason_of_break() -> None:
    """Of other errors there is none."""
    assert private.reason_of_break(ValueError("User-inserted graph break. Message: too long\n")) == "too long"
    assert private.reason_of_break(ValueError("other")) is None


def test_untraced() -> None:
    """The compiler is imported when the function is called, and the function is not traced."""
    code = (
        "import sys, torch; from structgrad.common.private import untraced\n"
        "f = untraced(lambda x: x + torch.compiler.is_compiling())\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "g = torch.compile(lambda x: f(x) + torch.compiler.is_compiling(), backend='eager')\n"
        "print(g(torch.zeros(())).item())"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout == "1.0\n"


def test_standard_gamma() -> None:
    """Mean and derivative of the mean are those of a gamma distribution, within five standard errors."""
    torch.manual_seed(0)
    concentration = torch.full((20_000,), 0.7, dtype=torch.float64, requires_grad=True)
    drawn = private.standard_gamma(concentration)
    (slope,) = torch.autograd.grad(drawn.sum(), concentration)
    for found, expected in ((drawn.detach(), 0.7), (slope, 1.0)):
        assert abs(found.mean() - expected) < 5 * found.std() / len(found) ** 0.5


def test_has_bfloat16_units() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("no /proc/cpuinfo to compare with")
    flags = set(cpuinfo.read_text().split())
    assert private.has_bfloat16_units() == bool(flags & {"avx512_bf16", "amx_tile"})


def test_compiler_errors() -> None:
    """A function that looks at values is no single program."""

    def looks(x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x

    with pytest.raises(private.compiler_errors()):
        torch.compile(looks, backend="eager", fullgraph=True)(torch.zeros(3))


def test_compiling_whole_steps() -> None:
    layer = nn.LSTM(2, 3)
    with private.compiling_whole_steps():
        out, _ = torch.compile(layer, backend="eager", fullgraph=True)(torch.zeros(1, 1, 2))
    torch.testing.assert_close(out, layer(torch.zeros(1, 1, 2))[0])


def test_with_captured_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments that inductor gets; `tests/training/test_compiled.py` runs it on a GPU."""
    from torch._inductor import compile_fx

    called = inspect.signature(compile_fx.compile_fx)
    monkeypatch.setattr(compile_fx, "compile_fx", lambda *p, **n: called.bind(*p, **n).arguments)
    program = torch.fx.symbolic_trace(lambda x: (x * 2 + 1,))
    handed = private.with_captured_graphs(program, [torch.ones(3)])
    assert handed["model_"] is program
    assert handed["config_patches"] == {"triton.cudagraphs": True}


# --- Lightning --------------------------------------------------------------------------------------------------------


class Line(pl.LightningModule):
    """Two weights, a validation, a logged test."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return ((batch - self.weight) ** 2).sum()

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val/loss", torch.tensor(float(self.global_step)))  # the first is the best

    def test_step(self, batch: Tensor, index: int) -> None:
        self.log("test/loss", 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.ones(4, 2), batch_size=None)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = train_dataloader


def trainer(folder: Path, steps: int, **options: object) -> pl.Trainer:
    return pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,  # type: ignore[arg-type]
    )


def test_log_the_test_at_the_last_step(tmp_path: Path) -> None:
    """In a run that is resumed after its last step."""
    first = trainer(tmp_path, 4, logger=False)
    first.fit(Line())
    first.save_checkpoint(tmp_path / "end.ckpt")
    logger = pl.loggers.CSVLogger(tmp_path)
    steps = []
    logger.log_metrics = lambda metrics, step: steps.append(step)  # type: ignore[method-assign, assignment, misc]
    resumed, line = trainer(tmp_path, 4, logger=logger), Line()
    resumed.fit(line, ckpt_path=tmp_path / "end.ckpt")
    private.log_the_test_at_the_last_step(resumed)
    resumed.test(line, verbose=False)
    assert steps == [4]


def test_skip_idle_callbacks(tmp_path: Path) -> None:
    """Only those parts are left of which a callback, or a parent of it, makes something."""
    seen: list[str] = []

    class Ends(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *rest: object) -> None:
            seen.append(f"{type(self).__name__} {trainer.global_step}")

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append("end")

    class Child(Ends):
        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append("backward")

    class Sections(PassThroughProfiler):
        def start(self, action_name: str) -> None:
            sections.append(action_name)

    sections: list[str] = []
    own = LambdaCallback(on_train_batch_start=lambda *_: seen.append("start"))
    callbacks = [Child(), own]
    fit = trainer(tmp_path, 1, logger=False, callbacks=callbacks, enable_checkpointing=False, num_sanity_val_steps=0)
    private.skip_idle_callbacks(fit)
    fit.profiler = Sections()  # type: ignore[attr-defined]
    fit.fit(Line())
    assert seen == ["start", "backward", "Child 1", "end"]
    parts = [section.rpartition(".")[2] for section in sections if "Child." in section]
    assert parts[parts.index("on_train_epoch_start") + 1 :][:2] == ["on_after_backward", "on_train_batch_end"]


def test_save_last(tmp_path: Path) -> None:
    """Also where it is not the best, and only once a step."""

    class Always(ModelCheckpoint):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super().on_validation_end(trainer, pl_module)
            for _ in range(2):
                private.save_last(self, trainer)

    checkpoint = Always(tmp_path, filename="best", monitor="val/loss", save_last=True, save_on_train_epoch_end=False)
    saved = []
    fit = trainer(tmp_path, 4, logger=False, callbacks=[checkpoint], val_check_interval=2, num_sanity_val_steps=0)
    save = fit.save_checkpoint
    fit.save_checkpoint = lambda file, *rest: (saved.append(Path(file).stem), save(file, *rest))  # type: ignore[method-assign, assignment]
    fit.fit(Line())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 2
    assert saved.count("best") == 1
