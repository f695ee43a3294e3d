"Checkpoints that are damaged or describe something else, and probes that several processes ask for at once."
import json, os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from cxr_noise_study import networks
from cxr_noise_study.networks import (build_model, cached_probe, card_of, fit_to_card, load_checkpoint, noise_level, read_state,
                                      read_tensors, save_checkpoint, write_tensors)
from cxr_noise_study.noise import TrainNoise
from cxr_noise_study.phantom import phantom
from cxr_noise_study.protocol import BACKBONES, SEGMENTERS, check_parameters
from cxr_noise_study.runs import adapted

ABOUT = dict(arch="resnet34", encoder="resnet34", outputs=["Edema"], mean=.5, std=.5)


@pytest.fixture(scope="module")
def tensors(): return build_model("resnet34").state_dict()


@pytest.mark.parametrize("content", [b"", b"a text, and no checkpoint at all", b"\x08\0\0\0\0\0\0\0{}      "])
def test_what_is_not_a_checkpoint_is_refused_with_its_name(tmp_path, content):
    (tmp_path/"text.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="text.safetensors is not a whole checkpoint of this project") as e:
        load_checkpoint(tmp_path/"text.safetensors")
    assert "\n" not in str(e.value)


def test_one_changed_bit_anywhere_is_noticed(tmp_path, tensors):
    file = write_tensors(tmp_path/"m.safetensors", {"w": torch.arange(100.)}, {"a": 1})
    whole = file.read_bytes()
    for k in (0, 9, len(whole)//2, len(whole) - 1):
        file.write_bytes(whole[:k] + bytes([whole[k] ^ 1]) + whole[k + 1:])
        with pytest.raises(ValueError, match="m.safetensors"): read_tensors(file)


@pytest.mark.parametrize("change, what", [
    (dict(arch="vnet"), "Did you mean"), (dict(arch="densenet121", encoder="densenet121"), "does not hold the densenet121"),
    (dict(outputs=["Edema", "Effusion"]), "does not hold the resnet34"), (dict(mean=None), "has no mean"),
    (dict(arch=None), "has no arch"), (dict(outputs=[]), "does not hold"), (dict(encoder="resnet18"), "its own encoder")])
def test_a_card_of_another_model_is_refused(tmp_path, tensors, change, what):
    card = {k: v for k, v in (ABOUT | change).items() if v is not None}
    file = write_tensors(tmp_path/"other.safetensors", tensors, card)
    with pytest.raises(ValueError) as e: load_checkpoint(file)
    assert what in str(e.value) and "other.safetensors" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_refused(tmp_path, tensors, value):
    file = write_tensors(tmp_path/"nan.safetensors", {**tensors, "net.fc.bias": torch.full((1,), value)}, ABOUT)
    with pytest.raises(ValueError, match=r"nan.safetensors .*not finite.*net.fc.bias"): load_checkpoint(file)


WRONG_CARDS = [dict(std=0), dict(std=-1.), dict(std=float("nan")), dict(mean=float("inf")), dict(mean="grey"), dict(std=True),
               dict(outputs=3), dict(arch=["resnet34"]), dict(encoder={}), dict(two_class=True)]


@pytest.mark.parametrize("change", WRONG_CARDS, ids=[str(change) for change in WRONG_CARDS])
def test_14_16_a_wrong_card_is_refused_in_one_line_with_the_file(tmp_path, tensors, change):
    file = write_tensors(tmp_path/"wrong.safetensors", tensors, ABOUT | change)
    with pytest.raises(ValueError, match="wrong.safetensors") as e: load_checkpoint(file)
    assert "\n" not in str(e.value)


def attacks(tensors, file):
    "Weights that are none, by name."
    spoilt = {**tensors, "layer1.0.bn1.weight": torch.full((64,), float("nan"))}
    yield "not finite", lambda: torch.save(spoilt, file)
    yield "a list", lambda: torch.save([torch.ones(2)], file)
    yield "numbers", lambda: torch.save({"a": 1, "b": "text"}, file)
    yield "whole model", lambda: torch.save(torch.nn.Linear(2, 2), file)
    yield "empty", lambda: file.write_bytes(b"")
    yield "text", lambda: file.write_text("weights")
    yield "cut", lambda: (torch.save(tensors, file), file.write_bytes(file.read_bytes()[:-1000]))


@pytest.mark.parametrize("k", range(7))
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_14_16_wrong_weights_are_refused_in_one_line_with_the_file(tmp_path, tensors, k, suffix):
    file = tmp_path/f"wrong{suffix}"
    what, write = list(attacks({name.removeprefix("net."): t for name, t in tensors.items()}, file))[k]
    write()
    with pytest.raises(ValueError, match=f"wrong{suffix}") as e: build_model("resnet34", weights=str(file))
    assert "\n" not in str(e.value), what


@pytest.mark.parametrize("card", [dict(mean=.5, std=0), dict(mean=.5, std=-1), dict(mean="x", std=1), [1, 2]])
def test_14_16_weights_with_a_wrong_normalisation_are_refused(tmp_path, card):
    from safetensors.torch import save_file
    save_file({"w": torch.ones(2)}, tmp_path/"w.safetensors", metadata={"card": json.dumps(card)})
    with pytest.raises(ValueError, match="w.safetensors") as e: read_state(tmp_path/"w.safetensors")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_14_16_checkpoints_have_the_mode_that_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try: file = write_tensors(tmp_path/"m.safetensors", {"w": torch.ones(3)}, {})
    finally: os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("card, what", [
    (dict(outputs=["lungs"], size=100), "multiple of 32"), (dict(outputs=["lungs"], size="big"), "not a whole number"),
    (dict(outputs=["lungs"], train_noise="laddr"), "laddr"), ({}, "predicts"), (dict(outputs=3), "predicts 3")])
def test_14_16_a_card_that_no_run_can_follow_is_refused_with_the_file(tmp_path, card, what):
    file = write_tensors(tmp_path/"odd.safetensors", {"w": torch.ones(3)}, card)
    with pytest.raises(ValueError, match="odd.safetensors") as e: adapted(check_parameters(dict(checkpoint=str(file))))
    assert what in str(e.value) and "\n" not in str(e.value)


def test_a_pair_with_another_negative_class_is_refused(tmp_path):
    p = check_parameters(dict(task="Nodule|Edema", arch="resnet34", size=64))
    with pytest.raises(ValueError, match=r"distinguishes Effusion\|Edema, but the task is Nodule\|Edema"):
        fit_to_card(dict(outputs=["Edema"], task="Effusion|Edema"), p)
    with pytest.raises(ValueError, match="predicts Nodule"): fit_to_card(dict(outputs=["Nodule"], task="Edema|Nodule"), p)
    assert fit_to_card(dict(outputs=["Edema"], task="Nodule|Edema"), p) == {} == fit_to_card(dict(outputs=["Edema"]), p)


@pytest.mark.parametrize("arch, encoder", [("skidnet", "skidnet"), ("aggregated", "aggregated"), ("sharp_unet", "efficientnet_lite0")])
def test_a_network_that_restores_comes_back(tmp_path, arch, encoder):
    model, x = build_model(arch).eval(), torch.rand(2, 1, 64, 64)
    loaded, card = load_checkpoint(save_checkpoint(model, tmp_path/"r.safetensors", arch=arch, encoder=encoder, outputs=["image"]))
    assert torch.equal(loaded(x), model(x)) and (card["mean"], card["std"]) == ((.5, .5) if arch == "sharp_unet" else (0, 1))
    again = build_model(arch, weights=str(tmp_path/"r.safetensors"), seed=1)        # its encoder starts another training
    assert again.mean == model.mean


def test_equal_models_are_equal_files(tmp_path, tensors):
    files = [write_tensors(tmp_path/f"{k}.safetensors", tensors, ABOUT) for k in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_two_class_head_comes_back(tmp_path):
    model = build_model("resnet34", two_class=True).eval()
    loaded, card = load_checkpoint(save_checkpoint(model, tmp_path/"two.safetensors", **ABOUT))
    x = torch.rand(2, 1, 64, 64)
    assert card["two_class"] and torch.equal(loaded(x), model(x)) and loaded(x).shape == (2, 1)


def test_the_card_takes_the_place_of_what_was_asked_for():
    trained = check_parameters(dict(arch="fpn", size=128, normalise="percentile", train_noise="ladder", dataset="folder",
                                    data_dir="/x"))
    card = json.loads(json.dumps(card_of(trained))) | {"outputs": ["lungs"]}
    asked = check_parameters(dict(seed=3, replicates=2))
    found = fit_to_card(card, asked)
    assert found == {"arch": "fpn", "size": 128, "normalise": "percentile", "train_noise": TrainNoise.parse("ladder")}
    assert (replace(asked, **found).seed, replace(asked, **found).replicates) == (3, 2)
    assert fit_to_card({"outputs": ["lungs"]}, asked) == {}                                 # an older card says less
    with pytest.raises(ValueError, match="predicts lungs, but task heart needs heart"):
        fit_to_card(card, check_parameters(dict(task="heart")))


def test_a_probe_measures_once_however_many_ask(tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_NOISE_HOME", str(tmp_path))
    asked = []
    def measure(): asked.append(1); return {"fast": len(asked)}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: cached_probe({"q": 1}, measure)["fast"], range(8)))
    assert answers == [1]*8 and len(asked) == 1
    [file] = (tmp_path/"cache").glob("probe-*.json")
    file.write_text("{")                                                                    # damaged: measured anew
    assert cached_probe({"q": 1}, measure)["fast"] == 2


def test_another_machine_is_another_question(tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_NOISE_HOME", str(tmp_path))
    first = cached_probe({"q": 1}, lambda: {"fast": 1})
    monkeypatch.setattr(networks, "processor", lambda device: "another")
    assert first["fast"] == 1 and cached_probe({"q": 1}, lambda: {"fast": 2})["fast"] == 2


def test_18_every_network_begins_as_if_it_were_not_told_the_noise_level():
    x = torch.rand(2, 1, 64, 64)
    for arch in (*SEGMENTERS, *BACKBONES):
        told = build_model(arch, weights="none", noise_input="immerkaer").eval()
        first = next(module for module in told.modules() if isinstance(module, torch.nn.Conv2d))
        with torch.inference_mode():
            before = told(x)
            first.weight = torch.nn.Parameter(first.weight[:, :3].clone())
            first.in_channels, told.level = 3, False
            torch.testing.assert_close(told(x), before, msg=arch)


def test_18_the_noise_level_is_that_of_the_image_and_of_scikit_image():
    from skimage.restoration import estimate_sigma
    images, rng = phantom(4, size=128).images/255, np.random.default_rng(0)
    for sigma in .05, .1, .2:                               # a chance error of 1 %; anatomy is taken for a little noise
        noisy = images + sigma*rng.normal(size=images.shape)
        found = noise_level(torch.from_numpy(noisy)[:, None])[:, 0, 0, 0].numpy()
        theirs = np.array([estimate_sigma(image) for image in noisy])
        assert abs(found/sigma - 1).max() < .05 and abs(found/theirs - 1).max() < .07
