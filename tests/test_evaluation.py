"What no notebook can hold: a killed grid, a report of nothing, of one run, and of a damaged one."
import re, shutil, signal, subprocess, sys, time
from pathlib import Path

import pandas as pd

from cxr_noise_study.results import report_page
from tests.conftest import ROOT, papermill

GRID = """
import sys, time
import numpy as np, torch
from cxr_noise_study.evaluation import evaluate_robustness
from cxr_noise_study.phantom import phantom
made, slow = phantom(12, size=64), float(sys.argv[2])
def darker(x):
    time.sleep(slow)
    with open(sys.argv[1] + "/calls", "a") as f: f.write("x")
    return (.45 - x)*10
records = evaluate_robustness(darker, made.images, made.lungs, output="logits", channels=1, batch_size=2,
                              path=sys.argv[1], name="darker", progress=False)
records.to_parquet(sys.argv[1] + "/all.parquet")
"""


def grid(path, slow):
    path.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, "-c", GRID, str(path), str(slow)], cwd=path)


def test_a_killed_grid_keeps_whole_batches_and_goes_on(tmp_path):
    process = grid(tmp_path/"killed", .02)
    try:
        deadline = time.time() + 120
        while len(list((tmp_path/"killed").glob("0*.parquet"))) < 2 and time.time() < deadline: time.sleep(.01)
        process.send_signal(signal.SIGKILL)
    finally: process.kill(); process.wait()
    kept = sorted((tmp_path/"killed").glob("0*.parquet"))
    assert 2 <= len(kept) < 6 and all(len(pd.read_parquet(f)) == 2*14 for f in kept)       # each one whole
    assert not (tmp_path/"killed"/"all.parquet").exists()
    before = [f.stat().st_mtime_ns for f in kept]
    (tmp_path/"killed"/"calls").unlink()
    assert grid(tmp_path/"killed", 0).wait() == 0 and grid(tmp_path/"unbroken", 0).wait() == 0
    assert [f.stat().st_mtime_ns for f in kept] == before                                  # read, not computed again
    assert len((tmp_path/"killed"/"calls").read_text()) == 14*(6 - len(kept))
    pd.testing.assert_frame_equal(*(pd.read_parquet(tmp_path/name/"all.parquet") for name in ("killed", "unbroken")))


def report(tmp_path, runs_dir):
    "Execute 05_results on the runs below runs_dir as `make report` does; return the page's HTML."
    command = [Path(sys.executable).parent/"papermill", "--no-progress-bar", "--cwd", ROOT/"nbs",
               ROOT/"nbs"/"05_results.ipynb", tmp_path/"results.ipynb", "-p", "runs_dir", runs_dir,
               "-p", "figures_dir", tmp_path/"figures"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return report_page(tmp_path/"results.ipynb", tmp_path/"report.html").read_text()


def outside(page): return re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?!data:)[^"]*"', page)


def test_a_report_of_nothing_says_so(tmp_path):
    page = report(tmp_path, tmp_path/"no runs")
    assert "There is no finished run at all" in page and "cannot be told: no run of lungs" in page
    assert not outside(page) and (tmp_path/"figures"/"figure_1.svg").exists()


def test_a_report_of_runs_a_damaged_one_among_them(tmp_path):
    done = papermill(tmp_path, quantum="0,10,0,0,0", electronic="0,0,10,6,8", task="lungs")
    assert done.returncode == 0, done.stderr[-2000:]
    done = papermill(tmp_path, quantum="0,10", electronic="0,0", task="Effusion|Edema", arch="resnet34", encoder="auto")
    assert done.returncode == 0, done.stderr[-2000:]
    one = sorted((tmp_path/"runs").glob("[!.]*/run.json"))[0].parent
    shutil.copytree(one, one.with_name("copied by hand"))
    page = report(tmp_path, tmp_path/"runs")
    assert "copied by hand" in page and "left out" in page                                  # named, not believed
    assert page.count("data:image/png") >= 4 and not outside(page)
    assert "No run on landmark" in page and "1 seed(s)" in page and "phantom, lungs, trained clean" in page
    for name in ("figure_1", "phantom_figure_2", "phantom_lungs_dice"):
        assert all((tmp_path/"figures"/f"{name}.{kind}").stat().st_size > 1000 for kind in ("svg", "png"))


def test_the_statistics_module_does_not_shadow_the_standard_one():
    code = ("import statistics; from cxr_noise_study import statistics as ours; "
            "assert statistics is not ours; statistics.mean")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
