"Real radiographs, where CXR_REAL_DATA names them."
import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_noise_study.datasets import (NIH_LABELS, PAIRS, SPLITS, folder_manifest, label_faults, load_radiographs, nih_table,
                                      plan_pairs, row_faults)
from cxr_noise_study.description import NEAR, fingerprints, leakage, leakage_summary
from cxr_noise_study.images import checkout
from tests.conftest import papermill, runs

NIH_COUNTS = dict(zip(NIH_LABELS, (11559, 2776, 4667, 2303, 13317, 2516, 1686, 227, 19894, 5782, 6331, 3385, 1431, 5302,
                               60361)))


def test_wingspan_is_read_as_it_is(real_data, tmp_path):
    data = load_radiographs("folder", "lungs_heart", real_data/"wingspan", size=128, cache_dir=tmp_path)
    manifest = folder_manifest(real_data/"wingspan")
    assert len(data) == len(manifest) and data.table.patient_id.nunique() == manifest.patient_id.nunique()
    assert (data.images.min((1, 2)) == 0).all() and (data.images.max((1, 2)) == 255).all()      # every image normalised
    lungs, heart = data.targets.mean((2, 3)).T
    assert np.median(lungs) > 1.5*np.median(heart) and (heart > .02).all() and (lungs < .6).all()
    share = data.table["split"].value_counts(normalize=True)
    assert abs(share["train"] - .7) < .01 and abs(share["test"] - .15) < .01


@pytest.fixture(scope="module")
def wingspan(real_data, tmp_path_factory):
    "A folder with one short run on Wingspan."
    folder = tmp_path_factory.mktemp("wingspan")
    done = papermill(folder, dataset="folder", data_dir=real_data/"wingspan", task="lungs", epochs=4, size=96, lr=3e-3)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_a_short_sweep_on_wingspan(real_data, wingspan):
    [(card, records)] = runs(wingspan)
    best = records[records.checkpoint == "best"]
    dice = best.groupby("condition").dice.mean()
    blank = 2*best.area_true/(best.area_true + 96*96)                                # calling everything lung
    assert dice["0,0"] > .8 > blank.mean() and dice["10,0"] < dice["0,0"]
    assert np.allclose(best.floor_dice, blank)
    assert sum(card["images"].values()) == len(folder_manifest(real_data/"wingspan"))
    assert card["rows"] == len(records) == 2*2*card["images"]["test"]                # two conditions, two checkpoints


def test_the_whole_table_of_chestxray14_has_the_published_counts(real_data):
    table = nih_table(real_data/"nih")
    assert len(table) == 112_120 and table.patient_id.nunique() == 30_805
    assert not [*row_faults(table), *label_faults(table.labels, NIH_LABELS)]
    counts = table.labels.str.split("|").explode().str.replace(" Thickening", "_Thickening").value_counts().to_dict()
    assert counts == NIH_COUNTS                                                      # of the release's own documentation


def test_pairs_are_planned_as_the_committed_table_says(real_data):
    "Two of the six: each takes a quarter of a minute, most of it in scikit-learn."
    stated = pd.read_csv(checkout()/"figures"/"chestxray14_plan.csv", keep_default_na=False)
    assert list(stated.pair) == list(PAIRS) and (stated["largest deviation of prevalence (points)"] < 2).all()
    few = stated[stated.pair.isin(["Effusion|Edema", "Fibrosis|Pleural_Thickening"])].reset_index(drop=True)
    plan = plan_pairs(real_data/"nih", few.pair)
    pd.testing.assert_frame_equal(plan, few, check_dtype=False)
    for row in plan.itertuples():
        negative, positive = row.pair.split("|")
        both = dict(plan.set_index("pair")["both (left out)"])[row.pair]
        assert row.negative == NIH_COUNTS[negative] - both and row.positive == NIH_COUNTS[positive] - both
        for name, share in SPLITS.items(): assert abs(getattr(row, name)/(row.negative + row.positive) - share) < .01


@pytest.mark.parametrize("task,negative,positive", [("Pneumonia|No Finding", 404, 402), ("Effusion|Edema", 63, 61)])
def test_chestxray14_subset(real_data, tmp_path, task, negative, positive):
    data = load_radiographs("chestxray14", task, str(real_data/"nih"), 224, cache_dir=tmp_path)
    assert (data.targets == 0).sum() == negative and data.targets.sum() == positive and not data.faults
    assert data.left_out["not on disk"] == len(data.missing) > 10_000
    assert data.table.groupby("patient_id")["split"].nunique().max() == 1
    for name, share in SPLITS.items():
        rows = data.where(name)
        assert abs(len(rows)/len(data) - share) < .02 and abs(data.targets[rows].mean() - data.targets.mean()) < .02
    assert set(data.table["view"]) == {"AP", "PA"} and set(data.table.sex) == {"F", "M"}
    assert (data.images.min((1, 2)) == 0).all() and (data.images.max((1, 2)) == 255).all()
    again = load_radiographs("chestxray14", task, str(real_data/"nih"), 224, cache_dir=tmp_path)
    assert again.data_hash == data.data_hash and isinstance(again.images, np.memmap)
    assert leakage_summary(leakage(data)).loc[["patient in two splits", "identical"], "across splits"].sum() == 0


def test_the_line_between_duplicates_and_other_images_holds_on_chestxray14(real_data, tmp_path):
    data = load_radiographs("chestxray14", "Pneumonia|No Finding", str(real_data/"nih"), 256, cache_dir=tmp_path)
    def jpeg(image):
        file = io.BytesIO(); Image.fromarray(image).save(file, "JPEG", quality=60); return np.asarray(Image.open(file))
    prints, copies = fingerprints(data.images), fingerprints(np.stack([jpeg(image) for image in data.images]))
    assert (prints*copies).sum(1).min() > NEAR
    patients, (i, j) = data.table.patient_id.to_numpy(), np.triu_indices(len(data), 1)
    assert (prints @ prints.T)[i, j][patients[i] != patients[j]].max() < NEAR


def test_a_short_sweep_on_chestxray14(real_data, tmp_path):
    done = papermill(tmp_path, dataset="chestxray14", data_dir=real_data/"nih", task="Effusion|Edema",
                     arch="efficientnet_lite0",
                     epochs=2, size=96)
    assert done.returncode == 0, done.stderr[-2000:]
    [(card, records)] = runs(tmp_path)
    assert set(records.dataset) == {"chestxray14"} and records.y_true.nunique() == 2
    assert len(records) == 2*2*card["images"]["test"] and set(records["view"]) == {"AP", "PA"}


def test_a_model_of_one_hospital_on_images_of_another(real_data, wingspan, tmp_path):
    "External evaluation: trained on Wingspan, tested on all of the COVID set, which has no training images."
    checkpoint = next((wingspan/"runs").glob("[!.]*/checkpoint.safetensors"))
    done = papermill(tmp_path, dataset="folder", data_dir=real_data/"wingspan", task="lungs", size=96,
                     checkpoint=checkpoint, test_dataset="folder", test_dir=real_data/"covid")
    assert done.returncode == 0, done.stderr[-2000:]
    [(card, records)] = runs(tmp_path)
    best = records[records.checkpoint == "best"]
    assert set(best.dataset) == {"wingspan"} and set(best.test_set) == {"covid"}
    assert best.image_id.nunique() == card["images"]["test"] == len(folder_manifest(real_data/"covid"))
    dice = best.groupby("condition").dice.mean()
    assert dice["0,0"] > best.floor_dice.mean() and dice["10,0"] < dice["0,0"]
