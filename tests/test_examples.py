"""The scripts in ``examples`` run."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest


def test_supervised_parser(root: Path) -> None:
    command = [sys.executable, str(root / "examples" / "supervised_parser.py"), "SparseMAPLoss", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    assert "attachment score" in done.stdout


CONLLU = """\
# sent_id = 1
# text = Don't cats see the dogs?
1-2\tDon't\t_\t_\t_\t_\t_\t_\t_\t_
1\tDo\tdo\tAUX\t_\t_\t4\taux\t_\t_
2\tn't\tnot\tPART\t_\t_\t4\tadvmod\t_\t_
3\tcats\tcat\tNOUN\t_\t_\t4\tnsubj\t_\t_
4\tsee\tsee\tVERB\t_\t_\t0\troot\t_\t_
4.1\tsaw\t_\t_\t_\t_\t_\t_\t_\t_
5\tthe\tthe\tDET\t_\t_\t6\tdet\t_\t_
6\tdogs\tdog\tNOUN\t_\t_\t4\tobj\t_\t_

1\tcats\tcat\tNOUN\t_\t_\t2\tnsubj\t_\t_
2\tsee\tsee\tVERB\t_\t_\t0\troot\t_\t_
"""


def test_supervised_parser_on_conllu(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "some.conllu"
    file.write_text(CONLLU, encoding="utf-8")
    script = root / "examples" / "supervised_parser.py"
    monkeypatch.setattr(sys, "argv", [str(script), "NegativeLogLikelihood", "100", str(file), str(file)])
    with redirect_stdout(io.StringIO()) as printed:
        made = runpy.run_path(str(script))
    assert printed.getvalue().splitlines()[-1].endswith("100.0%")  # two sentences are learnt by heart
    assert made["read_conllu"](file) == [
        (["Do", "n't", "cats", "see", "the", "dogs"], [4, 4, 4, 0, 6, 4]),
        (["cats", "see"], [2, 0]),
    ]
    assert made["tokens"].tolist() == [[1, 2, 2, 3, 4, 2, 2], [1, 3, 4, 0, 0, 0, 0]]  # cats and see occur twice
    assert made["trees"].nonzero().tolist() == [
        [0, 0, 4], [0, 4, 1], [0, 4, 2], [0, 4, 3], [0, 4, 6], [0, 6, 5], [1, 0, 2], [1, 2, 1]
    ]  # fmt: skip
    for old, new, words in (
        ("3\tcats", "4\tcats", "line 6: .* ID 3"),
        ("\t0\troot", "\t9\troot", "no word 9"),
        ("\t0\troot", "\t1\troot", "circle"),
    ):
        file.write_text(CONLLU.replace(old, new), encoding="utf-8")
        with pytest.raises(SystemExit, match=words):
            made["read_conllu"](file)
