"What keeps the project whole: reading order, exports in step with notebooks, clean pages, a README that is the index."
import ast, json, re, shutil, subprocess, sys
from itertools import takewhile
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from tests.conftest import ROOT

BIN = Path(sys.executable).parent
NOTEBOOKS = sorted((ROOT/"nbs").glob("*.ipynb"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "The files that git tracks, elsewhere."
    there = tmp_path_factory.mktemp("copy")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.splitlines()
    for name in names:
        (there/name).parent.mkdir(parents=True, exist_ok=True); shutil.copy(ROOT/name, there/name)
    return there, names


def test_clean_and_export_leave_no_difference(copy):
    there, names = copy
    for tool in ("nbdev_clean", "nbdev_export"): subprocess.run([BIN/tool], cwd=there, check=True, capture_output=True)
    changed = [n for n in names if n.startswith(("nbs/", "cxr_noise_study/"))
               and (there/n).read_bytes() != (ROOT/n).read_bytes()]
    assert not changed, f"{changed} differ after nbdev_clean and nbdev_export"
    assert not [f.name for f in (there/"cxr_noise_study").glob("*.py") if f"cxr_noise_study/{f.name}" not in names]


def modules():
    "Module → number of its notebook in reading order, and the modules that it imports at any depth of its code."
    order, imports = {}, {}
    for place, path in enumerate(NOTEBOOKS):
        code = "".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code")
        if name := re.search(r"^#\| *default_exp (\w+)", code, re.M): order[name[1]] = place
    for name in order:
        tree = ast.parse((ROOT/"cxr_noise_study"/f"{name}.py").read_text())
        found = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
        imports[name] = {n.module.split(".")[-1] for n in found
                         if n.level or n.module.startswith("cxr_noise_study.")} & set(order)
    return order, imports


def test_every_notebook_imports_only_from_notebooks_before_it():
    order, imports = modules()                  # hence there is no import circle
    assert len(order) > 10
    wrong = [f"{name} imports {other}" for name, others in imports.items() for other in others
             if order[other] >= order[name]]
    assert not wrong


def test_what_needs_no_network_imports_none():
    code = """
import importlib, sys
for module in "noise channel images tasks datasets protocol statistics results claims".split():
    importlib.import_module(f"cxr_noise_study.{module}")
    if "torch" in sys.modules: sys.exit(f"{module} imports torch")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_show_no_warnings(path):
    outputs = [o for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    assert not [o for o in outputs if o.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_executed(path):
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert not [o for c in code for o in c.outputs if o.output_type == "error"]
    assert any(c.outputs for c in code)
    assert path.stat().st_size < 1_500_000


def test_readme_is_the_index(tmp_path):
    subprocess.run(["make", "-s", "readme", f"README={tmp_path/'README.md'}", "-o", ".venv/.installed"], cwd=ROOT,
                   check=True, capture_output=True)
    assert (tmp_path/"README.md").read_text() == (ROOT/"README.md").read_text()


def test_constraints_name_no_index():
    assert not [line for line in (ROOT/"constraints.txt").read_text().splitlines() if "://" in line
                or line.startswith("-")]


def test_the_table_of_what_helps_follows_from_the_records():
    "The means of README's table, by pandas alone."
    lines = (ROOT/"README.md").read_text(encoding="utf-8").splitlines()
    head = next(k for k, line in enumerate(lines) if line.startswith("|") and line.endswith(" on clean images |"))
    rows = [line.strip("| \n").split(" | ") for line in takewhile(lambda line: line.startswith("|"), lines[head + 2:])]
    printed = {name: [0. if cell == "no image changes" else float(cell.split()[0]) for cell in cells if cell.strip()] for name, *cells in rows}
    records = pd.concat([pd.read_parquet(ROOT/"data"/"findings"/name/"records") for name in ("segmentation", "help")])
    records = records[(records.arch == "unet") & (records.task == "lungs_heart") & (records.structure == "lungs")]
    about = [records[name].astype(str).map(lambda value: f", {kind} {value}" if value else "")
             for name, kind in (("adapt", "adapt"), ("denoiser", "denoiser"), ("noise_input", "noise input"))]
    arm = "trained on " + records.train_noise.astype(str) + sum(about[1:], about[0])
    seeds = records.dice.groupby([arm.rename("arm"), records.condition.astype(str), records.seed]).mean()
    dice = seeds.groupby(["arm", "condition"]).mean().unstack()[["0,1", "0,10", "1,0", "10,0", "0,0"]]
    base = dice.loc["trained on clean"]
    assert {*printed} >= {"trained on ladder", "trained on clean, adapt batchnorm=8", "trained on clean, denoiser exact_nlm", "lost by noise"}
    for name, values in printed.items():
        won = dice.loc[name] - base if name in dice.index else base["0,0"] - base       # the last row is what noise takes
        want = [*won[:4], -won["0,0"]][:len(values)]
        assert np.allclose(values, want, atol=.0051), name
