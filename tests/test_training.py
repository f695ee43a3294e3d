"Trainings that fail, stop, are interrupted or are resumed with something else; and one step of every architecture."
import math, warnings
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from cxr_noise_study.channel import corrupt
from cxr_noise_study.datasets import load_radiographs
from cxr_noise_study.networks import GreyInput, build_model, load_checkpoint, read_tensors
from cxr_noise_study.noise import Severity
from cxr_noise_study.protocol import HEADS, check_parameters, resolve_encoder
from cxr_noise_study.restorers import Series
from cxr_noise_study.runs import compute_run
from cxr_noise_study.training import Callback, RadiographLoader, choose_precision, train

FAST = dict(lr=.05, batch_size=4, device="cpu")


@pytest.fixture(scope="module")
def small(): return load_radiographs("phantom", "lungs_heart", size=64, phantoms=40)


def tiny():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GreyInput(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))


class Break(Callback):
    "Interrupt the third epoch."
    order = 71
    def __init__(self, patience): pass
    def after_batch(self):
        if len(self.history.rows) == 2 and self.training and self.iter == 3: raise KeyboardInterrupt


def interrupted(small, out, model=None, **options):
    with mock.patch.dict(train.__globals__, EarlyStop=Break), pytest.raises(KeyboardInterrupt):
        train(model or tiny(), small, out, epochs=4, **FAST, **options)


def test_a_loss_that_is_no_number_names_its_images(small, tmp_path):
    bad = small.where("train")[7]
    spoilt = small.targets.astype(np.float32).copy(); spoilt[bad] = np.nan
    with pytest.raises(FloatingPointError, match="loss is nan in training of epoch 1") as e:
        train(tiny(), replace(small, targets=spoilt), tmp_path, epochs=2, **FAST)
    assert str(small.table.image_id[bad]) in str(e.value) and not (tmp_path/"checkpoint.safetensors").exists()


def test_a_flat_loss_ends_the_run_after_its_patience(small, tmp_path):
    "With a rate too small to change any weight and no batch normalisation: the first epoch, and exactly ten more of 200."
    history = train(GreyInput(nn.Conv2d(3, 2, 1)), small, tmp_path, epochs=200, lr=1e-30, patience=10, batch_size=28,
                    device="cpu")
    assert (len(history), history.valid_loss.nunique()) == (11, 1)
    assert read_tensors(tmp_path/"checkpoint.safetensors")[1]["metrics"]["epoch"] == 1
    assert read_tensors(tmp_path/"swa.safetensors")[1]["metrics"]["averaged_epochs"] == [11, 11]


def test_a_state_of_another_training_is_refused(small, tmp_path):
    interrupted(small, tmp_path, train_noise="ladder")
    with pytest.raises(ValueError, match="another train_noise"): train(tiny(), small, tmp_path, epochs=4, **FAST)
    with pytest.raises(ValueError, match="another epochs"):
        train(tiny(), small, tmp_path, epochs=5, train_noise="ladder", **FAST)


def test_a_damaged_state_is_refused(small, tmp_path):
    interrupted(small, tmp_path)
    file = tmp_path/"state.safetensors"
    file.write_bytes(file.read_bytes()[:-50] + b"?"*50)
    with pytest.raises(ValueError, match="state.safetensors is not a whole checkpoint"):
        train(tiny(), small, tmp_path, epochs=4, **FAST)


def test_two_trainings_are_equal_to_the_last_bit(small, tmp_path):
    runs = [train(tiny(), small, tmp_path/name, epochs=3, train_noise="0.5*clean+0.5*0..10,0..10", augment="affine", **FAST)
            for name in "ab"]
    assert runs[0].drop(columns="seconds").equals(runs[1].drop(columns="seconds"))
    for file in "checkpoint.safetensors", "swa.safetensors":
        a, b = (read_tensors(tmp_path/name/file)[0] for name in "ab")
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_training_warns_of_nothing(small, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tiny(), small, tmp_path, epochs=2, augment="affine", **FAST)


def in_series():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GreyInput(Series(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(2))), 0, 1, 1)


@pytest.fixture(scope="module")
def images(): return load_radiographs("phantom", "restore", size=64, phantoms=40)


class Spy(Callback):
    "Record the weights of both networks after every epoch."
    order, seen = 71, None
    def __init__(self, patience): Spy.seen = []
    def after_epoch(self): self.seen.append([w.detach().clone() for w in self.learn.model.parameters()])


@pytest.mark.parametrize("stages, moving", [("apart", [(1, 0), (1, 0), (1, 0), (0, 1), (0, 1), (0, 1)]), ("together", [(1, 1)]*6),
                                            ("tuned", [(1, 0), (1, 0), (0, 1), (0, 1), (1, 1), (1, 1)])])
def test_networks_in_series_are_trained_in_stages(images, tmp_path, stages, moving):
    model = in_series()
    before = [w.detach().clone() for w in model.parameters()]
    with mock.patch.dict(train.__globals__, EarlyStop=Spy):
        history = train(model, images, tmp_path, epochs=6, stages=stages, train_noise="10,0", swa_start=-1, **FAST)
    for a, b, (first, second) in zip([before, *Spy.seen], Spy.seen, moving):
        assert [not torch.equal(x, y) for x, y in zip(a, b)] == [first]*2 + [second]*2
    kept = read_tensors(tmp_path/"checkpoint.safetensors")[1]["metrics"]["epoch"]
    assert kept > 6 - moving.count(moving[-1]) and ("stage" in history) == (stages != "together")
    assert model.net.alone is None                                          # both are applied again


def test_the_second_network_is_trained_on_what_the_first_gives(images, tmp_path):
    "With the second network alone in training, the loss is that of the whole on the same weights."
    model = in_series()
    history = train(model, images, tmp_path, epochs=4, stages="apart", swa_start=-1, **FAST)
    valid = images.images[images.where("valid")]/255
    with torch.inference_mode(): out = model(torch.from_numpy(valid[:, None]).float()).numpy()[:, 0]
    assert np.isclose(((out - valid)**2).mean(), history.valid_loss[2:].min(), rtol=1e-3)


@pytest.mark.parametrize("options", [dict(stages="apart"), dict(schedule="plateau", optimizer="sgd", stages="together")])
def test_stages_and_schedules_resume(images, tmp_path, options):
    "Interrupted in the third epoch, the first of the second stage."
    options = dict(options, train_noise="ladder", swa_start=4)
    interrupted(images, tmp_path/"broken", in_series(), **options)
    resumed, whole = (train(in_series(), images, tmp_path/name, epochs=4, **FAST, **options) for name in ("broken", "whole"))
    assert resumed.drop(columns="seconds").equals(whole.drop(columns="seconds"))
    for file in "checkpoint.safetensors", "swa.safetensors":
        a, b = (read_tensors(tmp_path/name/file)[0] for name in ("broken", "whole"))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_unknown_options_are_refused(small, tmp_path):
    for option, what in dict(augment="flop", precision="bf61", optimizer="adamm", schedule="cosin", device="gpu", train_noise="laddr").items():
        with pytest.raises(ValueError, match=what): train(tiny(), small, tmp_path, epochs=1, **FAST | {option: what})


@pytest.mark.parametrize("target, arch", [(target, arch) for target, table in HEADS.items() for arch in table])
def test_every_architecture_takes_a_step(target, arch, tmp_path):
    "AdamW's first step moves a weight w by lr·(1 + weight_decay·|w|), whatever the gradient."
    task = {"mask": "lungs", "label": "Effusion|Edema", "image": "restore"}[target]
    data = load_radiographs("phantom", task, size=64, phantoms=20)
    model = build_model(arch)
    begun = [w.detach().clone() for w in model.parameters()]
    history = train(model, data, tmp_path, epochs=1, lr=1e-4, batch_size=len(data.where("train")), swa_start=-1,
                    device="cpu", train_noise="10,0", card=dict(arch=arch, encoder=resolve_encoder(arch, "auto")))
    ended = load_checkpoint(tmp_path/"checkpoint.safetensors")[0]
    moved = max(((a - b).abs()/(1 + .01*a.abs())).max().item() for a, b in zip(begun, ended.parameters()))
    assert .99e-4 < moved < 1.01e-4 and math.isfinite(history.valid_loss[0])


def test_bf16_is_chosen_only_where_it_is_clearly_faster(tmp_path, monkeypatch):
    for k, (fp32, bf16, want) in enumerate([(1., .5, "bf16"), (1., .95, "fp32"), (1., 2., "fp32")]):
        monkeypatch.setenv("CXR_NOISE_HOME", str(tmp_path/str(k)))
        with mock.patch.dict(choose_precision.__globals__, time_steps=lambda *args, **kw: {"fp32": fp32, "bf16": bf16}):
            assert choose_precision("cpu")["precision"] == want
        assert choose_precision("cpu")["precision"] == want                 # from then on without measuring


def test_18_noise_comes_behind_other_grey_scales_and_frames_and_a_restorer_aims_at_what_stands_before_it():
    data = load_radiographs("phantom", "restore", size=64, phantoms=40)
    loader, changed = RadiographLoader(data, data.where("train"), bs=7, train=True, noise="0,4", augment="grey"), 0
    for x, y in loader:
        clean = (y*255).round().byte().numpy()[:, 0]
        expected = corrupt(clean, [Severity.parse("0,4")]*len(clean), loader.ids, seed=0, replicate=loader.epoch)
        np.testing.assert_array_equal((x*255).round().byte().numpy()[:, 0], expected)
        own = data.images[[list(data.table.image_id).index(name) for name in loader.ids]]
        changed += sum(abs(a.astype(int) - b).mean() > 2 for a, b in zip(clean, own))
    assert changed >= 25                                    # of 28


def test_18_a_run_is_told_the_noise_level_and_found_again_by_what_it_was_trained_with(tmp_path):
    given = dict(size=64, phantoms=40, ladder="10,0", precision="fp32", engine="torch", device="cpu", runs_dir=tmp_path)
    training = dict(epochs=1, swa_start=-1, train_noise="10,0", noise_input="immerkaer", augment="grey")
    run = compute_run(check_parameters(given | training))
    model = load_checkpoint(run.folder/"checkpoint.safetensors")[0]
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert model.level and first.weight[:, 3].abs().max() > 0               # learnt, from zero
    asked = f"{tmp_path}?train_noise=10, 0&noise_input=immerkaer&augment=grey&arch"
    tested = compute_run(check_parameters(given | dict(checkpoint=asked)))
    columns = ["train_noise", "noise_input", "augment", "arch", "seed"]
    assert tested.folder != run.folder and tested.history is None
    assert tested.records[columns].drop_duplicates().values.tolist() == [["10,0", "immerkaer", "grey", "unet", 0]]
    np.testing.assert_allclose(tested.records.dice, run.records.dice, atol=1e-9)
