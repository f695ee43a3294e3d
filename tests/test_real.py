"Real radiographs, where CXR_REAL_DATA names them."
import numpy as np
import pandas as pd

from cxr_noise_study.datasets import load_folder, read_manifest
from tests.conftest import papermill, runs


def test_wingspan_is_read_as_it_is(real_data, tmp_path):
    data = load_folder("lungs_heart", real_data/"wingspan", size=128, cache_dir=tmp_path)
    manifest = read_manifest(real_data/"wingspan")
    assert len(data) == len(manifest) and data.table.patient_id.nunique() == manifest.patient_id.nunique()
    assert (data.images.min((1, 2)) == 0).all() and (data.images.max((1, 2)) == 255).all()      # every image normalised
    lungs, heart = data.targets.mean((2, 3)).T
    assert np.median(lungs) > 1.5*np.median(heart) and (heart > .02).all() and (lungs < .6).all()
    share = data.table["split"].value_counts(normalize=True)
    assert abs(share["train"] - .7) < .01 and abs(share["test"] - .15) < .01


def test_a_short_sweep_on_wingspan(real_data, tmp_path):
    done = papermill(tmp_path, dataset="folder", data_dir=real_data/"wingspan", task="lungs", epochs=4, size=96,
                     lr=3e-3)
    assert done.returncode == 0, done.stderr[-2000:]
    [(told, records)] = runs(tmp_path)
    dice = records.groupby(["s_q", "s_e"]).dice.mean()
    blank = 2*records.area_true/(records.area_true + 96
                                 *96)               # calling everything lung
    assert dice[0, 0] > .8 > blank.mean() and dice[10, 0] < dice[0, 0]
    assert sum(told["images"].values()) == len(read_manifest(real_data
                                                             /"wingspan")) and told["rows"] == 2*told["images"]["test"]
