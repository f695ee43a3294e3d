"Pretext tasks, from the restorer to the classifier, and what does not go together (issue 16)."
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision

from cxr_noise_study import crop
from cxr_noise_study.crop import crop_radiographs, lung_boxes
from cxr_noise_study.datasets import load_radiographs
from cxr_noise_study.ensembles import fit_attention, load_members
from cxr_noise_study.images import square
from cxr_noise_study.networks import build_model, read_tensors, save_checkpoint
from cxr_noise_study.protocol import check_parameters
from cxr_noise_study.runs import compute_run, load_sets
from cxr_noise_study.study import plan_study, read_study
from tests.conftest import ROOT

COMMON = dict(dataset="folder", split="whole", size=64, epochs=1, ladder="0,0 0,4", precision="fp32", engine="torch", device="cpu", swa_start=-1,
              encoder="resnet18", weights="none")
PAIR = "Edema|Effusion"


def run(where, **given):
    "Compute a small run."
    return compute_run(check_parameters(COMMON | dict(runs_dir=str(where)) | given))


@pytest.fixture(scope="module", autouse=True)
def the_folder(folder): COMMON["data_dir"] = str(folder)


@pytest.fixture(scope="module")
def restorer(tmp_path_factory):
    "A finished run that has learnt to remove blur."
    return run(tmp_path_factory.mktemp("pretext"), task="restore", arch="sharp_unet", loss="ssim", optimizer="adam",
               schedule="plateau", train_noise="pretext_blur", ladder="pretext_blur")


@pytest.mark.parametrize("given", [dict(task=PAIR, arch="pooled", loss="cross_entropy", optimizer="sgd", schedule="plateau"),
                                   dict(task="lungs", arch="unet")], ids=["classifier", "segmenter"])
def test_16_3_a_run_starts_from_the_encoder_of_a_restorer(restorer, tmp_path, given):
    start = run(tmp_path, **given, weights=str(restorer.folder), lr=1e-12)              # nothing moves but batch statistics
    theirs, ours = (read_tensors(r.folder/"checkpoint.safetensors")[0] for r in (restorer, start))
    theirs, ours = ({name.split("encoder.")[1]: t for name, t in tensors.items() if "encoder." in name} for tensors in (theirs, ours))
    assert theirs.keys() == ours.keys() and len(theirs) > 100
    for name, t in theirs.items():
        if name == "conv1.weight": t = t.repeat(1, 3, 1, 1)/3
        if "running" in name or "num_batches" in name: continue
        torch.testing.assert_close(ours[name], t, atol=1e-6, rtol=0)
    assert set(start.records.weights) == {restorer.folder.name}
    card = json.loads((start.folder/"run.json").read_text())
    assert card["parameters"]["weights"] == str(restorer.folder/"checkpoint.safetensors")


def test_16_3_the_question_for_a_run_is_its_folder(restorer):
    asked = dict(COMMON, task=PAIR, arch="pooled")
    question = f"{restorer.folder.parent}?train_noise=pretext_blur&weights=none"
    assert check_parameters(asked | dict(weights=question)) == check_parameters(asked | dict(weights=str(restorer.folder)))
    with pytest.raises(ValueError, match="must fit one finished run with seed 5, train_noise pretext_blur, weights none, and fits 0 of 1"):
        check_parameters(asked | dict(weights=question, seed=5))


@pytest.mark.parametrize("name, encoder, starts, runs", [("pretext_classifiers", "efficientnet_lite0", ("none", "packaged"), 18),
                                                         ("pretext_vgg16", "vgg16", ("none",), 12)])
def test_16_4_each_classifier_starts_from_the_pretext_run_of_its_seed(folder, tmp_path, monkeypatch, name, encoder, starts, runs):
    for seed, weights, noise in product(range(3), starts, ("pretext_noise", "pretext_blur")):
        (there := tmp_path/"runs"/f"{seed}-{weights}-{noise}").mkdir(parents=True)
        (there/"run.json").write_text(json.dumps({"parameters": dict(seed=seed, weights=weights, train_noise=noise, encoder=encoder)}))
        (there/"checkpoint.safetensors").write_text(there.name)             # a run's key follows from the file's content
    (file := tmp_path/"vgg16.pth").touch()
    for variable, place in dict(PRETEXT_DIR=folder, PRETEXT_RUNS=tmp_path/"runs", VGG16_WEIGHTS=file).items():
        monkeypatch.setenv(variable, str(place))
    plan = plan_study(read_study(ROOT/"nbs"/"params"/f"{name}.yaml"))
    planned = [check_parameters(json.loads(text)) for text in plan.parameters]
    assert len(planned) == plan.key.nunique() == runs and {p.encoder for p in planned} == {encoder}
    behind = [(p.seed, Path(p.weights).parent.name) for p in planned if "pretext_" in p.weights]
    assert len(set(behind)) == 6*len(starts) and all(name.startswith(f"{seed}-") for seed, name in behind)


@pytest.mark.parametrize("given, message", [
    (dict(encoder="resnet34"), "of the encoder are in mine"),
    (dict(arch="densenet121", encoder="auto"), "of the encoder are in mine"),
    (dict(shares="30/10/60"), "was trained on patients of"),
])
def test_16_3_weights_that_do_not_fit_are_refused_in_one_line(restorer, tmp_path, given, message):
    with pytest.raises(ValueError) as e: run(tmp_path, **dict(task=PAIR, arch="pooled", weights=str(restorer.folder)) | given)
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.glob("*/checkpoint.safetensors"))


def test_16_3_imagenet_weights_of_vgg16_come_from_a_file(tmp_path):
    "The layout of torchvision's vgg16-397923af.pth, with random numbers."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torchvision.models.vgg16()
    torch.save(theirs.state_dict(), file := tmp_path/"vgg16.pth")
    ours = build_model("pooled", "vgg16", str(file), outputs=2, two_class=True)
    x = torch.rand(1, 1, 64, 64)
    features = ours.net.net.encoder(((x - ours.mean)/ours.std).expand(-1, 3, -1, -1))[-1]
    torch.testing.assert_close(features, theirs.features[:30](((x - .449)/.226).expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-4)


@pytest.fixture
def true_lungs(monkeypatch):
    "Lungs that are found as they are, but for the third image's."
    data = load_radiographs("phantom", "lungs", size=128, phantoms=40)
    found = data.targets[:, 0].astype(bool)
    found[2] = False
    monkeypatch.setattr(crop, "lung_finder", lambda text: (None, 0, 128, text))
    monkeypatch.setattr(crop, "find_lungs", lambda *_: found)
    return data, found


def test_16_2_images_are_cut_to_the_lungs_and_counted_where_there_are_none(true_lungs):
    data, found = true_lungs
    cut = crop_radiographs(data, "test 16.2", 64)
    assert cut.images.shape == (40, 64, 64) and cut.targets.shape == (40, 1, 64, 64)
    assert (cut.table.crop == "whole").tolist() == [k == 2 for k in range(40)]
    assert cut.faults == ("note: the lungs were not found in 1 of 40 images, which are kept whole",)
    np.testing.assert_array_equal(cut.images[2], np.rint(square(data.images[2], 64)))
    share = data.targets[:, 0].mean((1, 2))
    for k, (x0, y0, x1, y1) in enumerate(lung_boxes(found)):
        if k == 2: continue
        side = max(x1 - x0, y1 - y0)
        assert abs(cut.targets[k].mean()*side**2 - share[k]) < .01                      # all of the lungs, magnified
    assert cut.data_hash != data.data_hash


def test_16_2_a_run_looks_for_the_lungs_with_another_run(tmp_path):
    finder = run(tmp_path, task="lungs", arch="unet", epochs=2, lr=3e-3, batch_size=4)
    p = check_parameters(COMMON | dict(task=PAIR, arch="pooled", crop=str(finder.folder), runs_dir=str(tmp_path)))
    start = compute_run(p)
    card = json.loads((start.folder/"run.json").read_text())
    images = pd.read_csv(start.folder/"images.csv")
    assert card["kept_whole"] == (images.crop == "whole").sum() < 40 and len(images) == 40
    whole, _ = load_sets(replace(p, crop=""))
    assert load_sets(p)[0].images.shape == whole.images.shape
    with pytest.raises(ValueError, match="must outline lungs, and gives Effusion"):
        load_sets(replace(p, crop=str(start.folder/"checkpoint.safetensors")))


def test_16_9_models_without_pooled_features_and_of_other_data(tmp_path):
    images, targets = np.zeros((2, 64, 64), np.uint8), np.array([[0], [1]])
    for arch, name in ("unet", "Unet"), ("skidnet", "SkipNet"):
        with pytest.raises(ValueError) as e: fit_attention([build_model("pooled", "resnet18", "none"), build_model(arch)], images, targets)
        assert f"a {name} has no pooled features" in str(e.value) and "\n" not in str(e.value)
    def saved(name, **card):
        about = dict(arch="pooled", encoder="resnet18", outputs=["Effusion"], task=PAIR, dataset="phantom", size=64) | card
        return save_checkpoint(build_model("pooled", "resnet18", "none"), tmp_path/f"{name}.safetensors", **about)
    for k, (card, what) in enumerate([(dict(dataset="nih"), "dataset"), (dict(outputs=["Mass"]), "outputs")]):
        with pytest.raises(ValueError) as e: load_members(saved("a"), saved(f"other{k}", **card))
        assert f"differ in {what}" in str(e.value) and "\n" not in str(e.value)
