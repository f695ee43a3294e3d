"One file outside the package adds a noise source, a metric and a data set; everything else takes them as its own."
import json, subprocess, sys

import numpy as np
import pandas as pd
import pytest

from tests.conftest import ROOT

EXAMPLE = ROOT/"examples"/"dead_pixels.py"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("example")
    run = subprocess.run([sys.executable, str(EXAMPLE), str(out)], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    [folder] = [f.parent for f in (out/"runs").glob("[!.]*/run.json")]
    return out, folder, run.stdout


def test_the_example_is_short(): assert len(EXAMPLE.read_text().splitlines()) <= 40


def test_corrupt_and_evaluate_robustness_take_the_source_and_the_metric(done):
    assert "dead_pixels=20" in done[2] and "area_error" in done[2]


def test_a_papermill_run_trains_and_is_tested_on_the_new_source(done):
    card, records = json.loads((done[1]/"run.json").read_text()), pd.read_parquet(done[1]/"records.parquet")
    assert card["parameters"]["train_noise"] == "dead_pixels=0..30" and card["parameters"]["extend"]
    assert set(records.condition) == {"0,0", "4,2", "dead_pixels=20"}
    assert set(records.dataset) == {"toy"} and records.area_error.notna().all() and records.floor_area_error.notna().all()


def test_the_floor_of_the_new_metric_follows_without_a_line(done):
    records = pd.read_parquet(done[1]/"records.parquet").query("condition == '0,0' and checkpoint == 'best'")
    want = 64*64/records.area_true - 1                              # everything is lung
    assert np.allclose(records.floor_area_error, want)


def test_run_page_and_report_show_them(done):
    for page in ("sweep", "results"):
        text = (done[0]/f"{page}.ipynb").read_text()
        assert "dead" in text and "relative error of the area" in text, page
