"""Command lines that cannot work: one line each that says what is wrong, before anything is written."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from structgrad.training.errors import explain
from structgrad.training.run import ConfigurationError, RunError, run
from tests.training.in_process import composed

LISTOPS, LAYOUT, BITS, TOY = ("task=listops", "task=graph_layout", "task=bit_vector_vae", "task=toy")

#: Overrides, and words of the line that refuses them.
WRONG: list[tuple[str, str]] = [
    # --- what does not compose ---
    ("", "task=... is missing; there are bit_vector_vae,"),
    ("task=", "task=: no such choice"),
    ("task=listop", "nearest: listops,"),
    ("task=null", "task"),
    ("task=3", "task=3: no such choice"),
    (f"{LISTOPS} estimator=straight_through", "estimator=straight_through: is now called identity_st"),
    (
        f"{LISTOPS} estimator._target_=structgrad.estimators.Relax",
        "estimator._target_: cannot import structgrad.estimators.Relax: structgrad.estimators.Relax is now called "
        "structgrad.estimators.RELAX",
    ),
    ("tsk=listops", "task"),
    (f"{LISTOPS} foo", "foo: missing EQUAL at '<EOF>'; expected key=value"),
    (f"{LISTOPS} seed=0,1", "-m makes a run of each, seed=[0,1] is a list"),
    (f"{LISTOPS} data=omniglot", "data=omniglot: this task has no data sets to choose from"),
    (f"{TOY} experiment=l2x/movies", "experiment=l2x/movies: is for task=l2x"),
    (f"{LISTOPS} estimator=mine", ", and 4"),
    (
        f"{TOY} structure=one_hot structure._target_=structgrad.structures.KSubset structure.k=2",
        "structure.k: its file lacks it, but the class takes it; type +structure.k=...",
    ),
    ("task=l2x data=omniglot", "task.data must be a ReviewData"),
    (f"{LISTOPS} +trainer.callbacks=[]", "trainer.callbacks: no such option; nearest: "),
    (
        f"{LISTOPS} +trainer.callbacks={{_target_:pytorch_lightning.Callback}}",
        "trainer.callbacks: no such option; nearest: ",
    ),
    (f"{LISTOPS} +task.callbacks={{_target_:torch.nn.ReLU}}", "task.callbacks: no such option; nearest: "),
    (f"{LISTOPS} +callbacks=[]", "nothing reads 'callbacks'; nearest: "),
    ("task=communication_game data=planted_reviews", "task.data must be a ConceptData"),
    (f"{LISTOPS} seed=[1", "[1"),
    (f"{LISTOPS} paths.runs=a(b", "needs quotes within quotes: 'paths.runs=\"a(b\"'"),
    (f"{LISTOPS} paths.runs=a=b{{c", "needs quotes within quotes: 'paths.runs=\"a=b{c\"'"),
    (f"{LISTOPS} trainer.patience=0", "trainer.patience must be a whole number of at least 1"),
    (f"{LISTOPS} trainer.matmul_precision=low", "nearest: "),
    (f"{LISTOPS} trainer.precision=bf16-true", "structures and optimisers need weights of 32 bits"),
    (f"{LISTOPS} trainer.precision=bf16-mixed trainer=cpu", "summed by kernels for float32 and float64"),
    (f"{LISTOPS} structure=arboresence", "nearest: arborescence,"),
    (f"{LISTOPS} structure=null", "structure"),
    (f"{LISTOPS} estimator=ssst", "nearest: sst,"),
    (f"{LISTOPS} estimator=marginalize", "nearest: marginal,"),
    (f"{LISTOPS} estimator=[sst,nvil]", "estimator"),
    (f"{LISTOPS} budget=smok", "nearest: smoke,"),
    (f"{LISTOPS} budget=null", "budget"),
    (f"{LISTOPS} budgets=quick", "budgets=quick: did you mean budget=quick?"),
    (f"{LISTOPS} budgets=listops/quick", "budgets=listops/quick: did you mean budget=quick?"),
    (f"{LISTOPS} trainer=cp", "nearest: cpu,"),
    (f"{LISTOPS} trainer=null", "trainer"),
    (f"{LISTOPS} logger=wanb", "nearest: wandb,"),
    (f"{LISTOPS} logger=neptune", "Neptune has ended its service"),
    (f"{LISTOPS} logger=null", "logger=null: no such choice"),
    (f"{LISTOPS} experiment=toy/tree", "experiment=toy/tree: no such choice"),
    (f"{LISTOPS} foo=1", "foo"),
    (f"{LISTOPS} task.hiden=3", "nearest: hidden,"),
    (f"{LISTOPS} task.data.trian=3", "nearest: train,"),
    (f"{LISTOPS} trainer.max_stps=3", "nearest: max_steps,"),
    (f"{LISTOPS} paths.run=x", "nearest: runs,"),
    (f"{LISTOPS} task.hidden=${{nope}}", "nope"),
    (f"{LISTOPS} task.hidden=???", "hidden"),
    # --- what nothing reads ---
    (f"{LISTOPS} +foo=1", "nothing reads 'foo'"),
    (f"{LISTOPS} ++sed=1", "nearest: seed,"),
    (f"{LISTOPS} +task.hiden=3", "nearest: hidden,"),
    (f"{LISTOPS} +task.data.lenght=3", "nearest: length,"),
    (f"{LISTOPS} +task.optimizer.weight_decai=3", "nearest: weight_decay,"),
    (f"{LISTOPS} +estimator.temprature=3", "nearest: temperature,"),
    (f"{LISTOPS} +structure.k=3", "structure.k: no such option"),
    (f"{LISTOPS} +trainer.max_epochs=3", "trainer.max_epochs: no such option"),
    (f"{LISTOPS} +paths.run=x", "paths.run: no such path"),
    (f"{LISTOPS} run.name=x", "run.name"),
    (f"{LISTOPS} run.name=", "run.name"),
    (f"{LISTOPS} run.folder=x", "run.folder"),
    (f"{LISTOPS} run=null", "run must be a mapping"),
    (f"{LISTOPS} paths=null", "paths must be a mapping"),
    (f"{LISTOPS} task._target_=structgrad.tasks.listops.Listops", "cannot import"),
    (f"{LISTOPS} task._target_=nowhere.Task", "No module named 'nowhere'"),
    (f"{LISTOPS} structure._target_=structgrad.layouts", "cannot import"),
    (f"{LISTOPS} ~task._target_", "task"),
    (f"{LISTOPS} ~task.optimizer", "task.optimizer is missing"),
    (f"{LISTOPS} ~structure._target_", "structure"),
    (f"{LISTOPS} +task.hidden=3", "remove + prefix: 'task.hidden=3'"),
    # --- seed ---
    *(
        (f"{LISTOPS} seed={seed}", "seed must be a whole number")
        for seed in ("-1", "abc", "nan", "null", "[1,2]", "1.5")
    ),
    (f"{LISTOPS} seed=true", "seed must be a whole number"),
    (f"{LISTOPS} seed=4294967296", "seed must be a whole number"),
    # --- trainer ---
    (f"{LISTOPS} trainer.accelerator=cuda9", "nearest: cuda,"),
    (f"{LISTOPS} trainer.accelerator=null", "trainer.accelerator"),
    (f"{LISTOPS} trainer.precision=8", "trainer.precision=8"),
    (f"{LISTOPS} trainer.precision=16-mixd", "nearest: 16-mixed,"),
    (f"{LISTOPS} trainer=cpu trainer.precision=16-mixed", "needs a GPU"),
    (f"{LISTOPS} trainer=cpu trainer.precision=16-true", "weights of 32 bits"),
    *(
        (f"{LISTOPS} trainer=cpu trainer.devices={d}", "trainer.devices")
        for d in ("0", "-2", "1.5", "null", "x", "[0,1]")
    ),
    (f"{LISTOPS} trainer.devices=true", "trainer.devices"),
    (f"{LISTOPS} trainer.strategy=dpp", "nearest: ddp,"),
    (f"{LISTOPS} trainer.strategy=null", "trainer.strategy"),
    *(
        (f"{LISTOPS} trainer.gradient_clip_val={v}", "gradient_clip_val must be a positive number")
        for v in ("-1", "0", "nan", "abc", "true")
    ),
    *(
        (f"{LISTOPS} trainer.{key}={value}", f"trainer.{key}")
        for key in ("max_steps", "val_every_n_steps", "log_every_n_steps")
        for value in ("null", "0", "-1", "1.5", "ten")
    ),
    *((f"{LISTOPS} trainer.pause_at={v}", "trainer.pause_at must be a whole number") for v in ("0", "-1", "1.5", "x")),
    (f"{LISTOPS} paths.progress=3", "paths.progress must be a path"),
    (f"{LISTOPS} trainer.max_steps=7", "trainer.val_every_n_steps=800 must lie between 1 and trainer.max_steps=7"),
    # --- paths ---
    *((f"{LISTOPS} paths.{p}=null", f"paths.{p} must be a path") for p in ("data", "cache", "runs")),
    (f"{LISTOPS} paths.runs=", "paths.runs must be a path"),
    (f"{LISTOPS} paths.results=3", "paths.results must be a path"),
    (f"{LISTOPS} paths.runs=[a]", "paths.runs must be a path"),
    (f"{LISTOPS} paths.test_file=nowhere.tsv", "paths.test_file: no file nowhere.tsv"),
    (f"{TOY} paths.test_file=nowhere.tsv", "toy reads no published test file"),
    # --- optimisers ---
    (f"{LISTOPS} task.optimizer.lr=-1", "task.optimizer"),
    (f"{LISTOPS} task.optimizer.lr=nan", "task.optimizer.lr must be a finite number"),
    (f"{LISTOPS} task.optimizer.lr=.inf", "task.optimizer.lr must be a finite number"),
    (f"{LISTOPS} task.optimizer.lr=null", "task.optimizer.lr must be a finite number"),
    (f"{LISTOPS} task.optimizer.lr=fast", "task.optimizer.lr must be a finite number"),
    (f"{LISTOPS} task.optimizer.weight_decay=-1", "task.optimizer"),
    (f"{LISTOPS} task.optimizer.weight_decay=nan", "task.optimizer.weight_decay must be a finite number"),
    (f"{LISTOPS} task.optimizer._target_=torch.optim.Adamm", "cannot import"),
    (f"{LISTOPS} task.optimizer=null", "task.optimizer must be"),
    (f"{LAYOUT} task.optimizer.lr=-1", "task.optimizer"),
    (f"{BITS} task.optimizer.lr=nan", "task.optimizer.lr must be a finite number"),
    # --- listops ---
    *((f"{LISTOPS} task.batch_size={b}", "batch_size must be") for b in ("0", "-4", "1.5", "null", "true", "100001")),
    *((f"{LISTOPS} task.hidden={v}", "hidden must be") for v in ("0", "-1", "60.5", "null", "x")),
    *((f"{LISTOPS} task.dropout={v}", "dropout must be") for v in ("nan", "-0.1", "1", "1.5", "null")),
    *((f"{LISTOPS} task.kl_weight={v}", "kl_weight must be") for v in ("-1", "nan", "null")),
    *((f"{LISTOPS} task.message_steps={v}", "message_steps must be") for v in ("-1", "0", "1.5")),
    (f"{LISTOPS} task.update=lstm", "update must be"),
    (f"{LISTOPS} task.dropout_per=node", "dropout_per must be"),
    (f"{LISTOPS} structure=none task.test_dropout=true", "test_dropout is about messages"),
    *((f"{LISTOPS} task.test_dropout={v}", "test_dropout must be") for v in ("1", "x", "null")),
    (f"{LISTOPS} estimator.clip=theta", "clip must be"),
    (f"{LISTOPS} task.data=null", "task.data must be a ListOpsData"),
    (f"{LISTOPS} task.data.train=0", "train"),
    (f"{LISTOPS} task.data.train=1.5", "task.data.train must be a whole number"),
    (f"{LISTOPS} task.data.length=10", "task.data.length must be a list"),
    (f"{LISTOPS} task.data.length=[10]", "data.length"),
    (f"{LISTOPS} task.data.length=[50,10]", "data.length"),
    (f"{LISTOPS} task.data.length=[1.5,10]", "data.length"),
    (f"{LISTOPS} task.data.operators=[MIN,SUM]", "data.operators"),
    (f"{LISTOPS} task.data.operator_probability=nan", "operator_probability"),
    (f"{LISTOPS} task.data.operator_probability=1", "operator_probability"),
    (f"{LISTOPS} task.data.depth=[1,30]", "tokens or more"),
    (f"{LISTOPS} structure=bit_vector", "listops needs a structure over the edges of a graph; got Subset"),
    (f"{LISTOPS} structure=top_edges task.data.length=[4,12] task.data.depth=[1,2]", "expressions of 4 tokens"),
    (f"{LISTOPS} structure.root=100", "expressions of 4 tokens"),
    (f"{LISTOPS} structure.root=-1", "root"),
    (f"{LISTOPS} structure.root=null", "structure.root must be a whole number"),
    (f"{LISTOPS} structure=none estimator=sst", "no latent variable"),
    (f"{LISTOPS} estimator=none", "needs an estimator"),
    # --- estimators ---
    *((f"{LISTOPS} estimator.temperature={v}", "estimator") for v in ("0", "-1", "nan", "null", "hot")),
    *((f"{LISTOPS} estimator.n_samples={v}", "n_samples must be") for v in ("0", "1.5", "null", "true")),
    (f"{LISTOPS} estimator.relaxation=sinkhorn", "sinkhorn"),
    (f"{LISTOPS} estimator.utility=gumble", "gumbel"),
    (f"{LISTOPS} estimator=reinforce estimator.action=Y", "estimator.action must be one of"),
    (f"{LISTOPS} estimator=reinforce estimator.baseline=emma", "one of ema"),
    (f"{LISTOPS} estimator=reinforce estimator.decay=2", "decay"),
    # --- graph layout ---
    *((f"{LAYOUT} task.variance={v}", "variance must be") for v in ("0", "-1", "nan")),
    *((f"{LAYOUT} task.teacher_forcing={v}", "teacher_forcing must be") for v in ("0", "1.5")),
    (f"{LAYOUT} task.both_directions=2", "task.both_directions must be true or false"),
    (f"{LAYOUT} task.eval_batch_size=0", "eval_batch_size must be"),
    (f"{LAYOUT} task.batch_size=50001", "batch_size must be"),
    (f"{LAYOUT} task.data.vertices=1", "vertices"),
    (f"{LAYOUT} task.data.steps=1", "steps"),
    (f"{LAYOUT} structure=top_edges task.data.vertices=4", "graphs of 4 vertices"),
    (f"{LAYOUT} structure=k_subset", "graph_layout needs a structure over the edges of a graph"),
    # --- bit vectors ---
    *((f"{BITS} task.bits={v}", "bits must be") for v in ("0", "-1", "1.5")),
    *((f"{BITS} task.{k}=0", f"{k} must be") for k in ("pixels", "hidden", "rank", "importance_samples")),
    (f"{BITS} structure=arborescence", "needs a latent vector of bits"),
    (f"{BITS} structure=k_subset estimator=sfe task.bits=4", "4 bits"),
    (f"{BITS} task.data.source=null", "task.data.source must be a text"),
    (f"{BITS} task.data.source=nowhere paths.data=/nowhere task.data.source=/nowhere/images", "no folder"),
    # --- toy ---
    (f"{TOY} task.size=1", "size"),
    (f"{TOY} task.eval_samples=0", "eval_samples"),
    (
        f"{TOY} estimator=relax estimator.critic=flat +estimator.shape=[7]",
        "shape is that of the parts, [n, n]; got [7]",
    ),
    (f"{TOY} estimator=relax estimator.critic=flat +estimator.shape=[7,0]", "shape must be at least 1"),
    (f"{TOY} structure=bit_vector", "needs trace"),
]
if not torch.cuda.is_available():
    WRONG += [
        (f"{LISTOPS} trainer=gpu", "trainer.accelerator=gpu: this machine has none"),
        (f"{LISTOPS} trainer.accelerator=cuda", "this machine has none"),
    ]


def refusal(overrides: str, folder: Path) -> str:
    """The text that the command prints after ``error:``; any other exception is a bug and escapes."""
    words = overrides.split()
    where = [f"paths.{name}={folder}" for name in ("runs", "cache") if f"paths.{name}" not in overrides]
    where = [] if "paths=null" in words else where
    try:
        config, choices, chosen = composed(*words, *where)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return explain(error, words)
    with pytest.raises(Exception) as caught:  # which it is is checked below
        run(config, choices, chosen)
    if not isinstance(caught.value, ConfigurationError | RuntimeError):
        raise caught.value
    return str(caught.value)


def test_the_table_is_long_enough() -> None:
    assert len({overrides for overrides, _ in WRONG}) == len(WRONG) >= 120


@pytest.mark.parametrize(("overrides", "words"), WRONG, ids=[overrides for overrides, _ in WRONG])
def test_it_is_refused_in_one_line_before_anything_is_written(overrides: str, words: str, tmp_path: Path) -> None:
    message = refusal(overrides, tmp_path)
    assert words in message
    assert "\n" not in message
    assert "object at 0x" not in message
    assert not [file for file in tmp_path.rglob("*") if file.suffix != ".lock" and file.is_file()]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            "estimator=relax estimator.critic=flat +estimator.shape=[4,4]",
            "the critic of relax was built for 16 parts (shape); the task has 25",
        ),
        ("estimator=relax estimator.context_size=7", "context_size 7; the context has 1 features"),
        ("estimator=nvil estimator.context_size=7", "context_size 7; the context has 1 features"),
    ],
)
def test_an_estimator_for_other_sizes_is_one_line_at_the_first_batch(
    overrides: str, words: str, tmp_path: Path
) -> None:
    message = refusal(f"{TOY} trainer=cpu budget=smoke {overrides}", tmp_path)
    assert message.startswith("estimator: ")
    assert message.endswith(words)


def test_a_data_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    message = refusal(f"task=l2x budget=smoke paths.data={tmp_path}/nowhere", tmp_path)
    assert message.endswith(
        f"There is no folder {tmp_path}/nowhere: STRUCTGRAD_DATA or paths.data says where data are."
    )
    (tmp_path / "nowhere").mkdir()
    assert "says where data are" not in refusal(f"task=l2x budget=smoke paths.data={tmp_path}/nowhere", tmp_path)


def test_vectors_of_another_size_than_the_embedding_are_one_line(tmp_path: Path) -> None:
    """Also in the files of Lei et al.: before anything is written of the run."""
    folder = tmp_path / "beeradvocate"
    folder.mkdir()
    words = [f"w{i}" for i in range(8)]
    rated = "".join(f"0.1 0.2 0.3 0.4 0.5\t{' '.join(words)}\n" for _ in range(40))
    for part in ("train", "heldout"):
        (folder / f"reviews.aspect1.{part}.txt.gz").write_bytes(gzip.compress(rated.encode()))
    (folder / "annotations.json").write_text(json.dumps({"x": words, "1": [[0, 1]]}) + "\n")
    vectors = "".join(f"{word} {' '.join(['0.5'] * 20)}\n" for word in words)
    (folder / "review+wiki.filtered.200.txt.gz").write_bytes(gzip.compress(vectors.encode()))
    where = [f"paths.{name}={tmp_path / place}" for name, place in (("data", ""), ("cache", "c"), ("runs", "runs"))]
    sizes = ["task.data.train=20", "task.data.val=20", "task.data.test=20", "task.data.words=8"]
    given = ["task=l2x", "data=beeradvocate", "budget=smoke", "trainer=cpu", "logger=csv", *where, *sizes]
    with pytest.raises(RunError, match=r"vectors have 20 numbers; set task\.embedding_size=20") as caught:
        run(*composed(*given))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()
