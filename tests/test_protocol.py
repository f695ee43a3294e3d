"Parameters that must be refused before any work, and identities that must or must not differ."
from dataclasses import fields, replace

import pytest

from cxr_noise_study.noise import LADDER, Severity, TrainNoise
from cxr_noise_study.protocol import (ARCHITECTURES, HEADS, Parameters, check_parameters, data_options, identity, labels,
                                      settings, varied)
from cxr_noise_study.tasks import find_task

REFUSED = [
    ({"epoch": 50}, "Did you mean 'epochs'?"), ({"arch": "unett"}, "Did you mean 'unet'?"),
    ({"task": "lung"}, "Did you mean 'lungs'?"), ({"arch": "resnet34"}, "not one of unet, deeplabv3, fpn"),
    ({"task": "Effusion|Edema"}, "not one of resnet34"), ({"size": 250}, "the nearest is 256"),
    ({"size": 16}, "size must be ≥ 32"), ({"epochs": 0}, "epochs must be ≥ 1, got 0"), ({"epochs": 2.5}, "not a whole number"),
    ({"epochs": "inf"}, "not a whole number"), ({"lr": "fast"}, "not a number"), ({"lr": 0}, "lr must be > 0"),
    ({"lr": "nan"}, "lr must be finite"), ({"weight_decay": "inf"}, "must be finite"), ({"weight_decay": -1}, "must be ≥ 0"),
    ({"dataset": "fantom"}, "Did you mean 'phantom'?"), ({"dataset": "folder"}, "needs data_dir"),
    ({"dataset": "chestxray14"}, "needs data_dir"), ({"data_dir": "/x"}, "data_dir"), ({"source": "JSRT"}, "source"),
    ({"split": "official"}, "split 'official'"), ({"normalise": "minmax"}, "Did you mean 'min-max'?"),
    ({"on_error": "ignore"}, "raise, skip"), ({"patience": -1}, "patience must be ≥ 0"), ({"swa_start": -2}, "must be ≥ -1"),
    ({"swa_start": 99}, "after the last epoch"), ({"loss": "bce"}, "not one of auto, dice"), ({"augment": "flop"}, "Did you mean 'flip'?"),
    ({"task": "Effusion|Edema", "arch": "resnet34", "loss": "dice"}, "not one of auto, bce, cross_entropy"),
    ({"weights": "packaged", "encoder": "resnet34"}, "no package ships"), ({"weights": "pakaged"}, "'packaged'"),
    ({"arch": "resnet34", "encoder": "resnet18", "task": "Effusion|Edema"}, "its own encoder"),
    ({"precision": "bf61"}, "Did you mean 'bf16'?"), ({"engine": "onyx"}, "Did you mean 'onnx'?"),
    ({"device": "gpu"}, "auto, cpu, cuda"), ({"device": "cpu:1"}, "auto, cpu, cuda"), ({"device": "cuda:"}, "auto, cpu"),
    ({"seed": 2**64}, "must be <"), ({"seed": -1}, "must be ≥ 0"), ({"seed": True}, "not a whole number"),
    ({"replicates": 0}, "must be ≥ 1"), ({"task": None}, "not text"), ({"ladder": []}, "ladder"), ({"ladder": "a"}, "a"),
    ({"ladder": [float("nan"), 0]}, ""), ({"train_noise": "laddr"}, "laddr"), ({"train_noise": "speckel=3"}, "speckel"),
    ({"quantum": [4, 10]}, "ladder="), ({"electronic": 0}, "ladder="), ({"test_dir": "/x"}, "need test_dataset"),
    ({"test_source": "JSRT"}, "need test_dataset"), ({"test_dataset": "folder"}, "test_dataset: data set 'folder' needs"),
    ({"test_dataset": "fantom"}, "Did you mean 'phantom'?"), ({"checkpoint": __file__}, ".safetensors"),
    ({"checkpoint": "none.safetensors"}, "does not exist"), ({"extend": "nowhere.py"}, "nowhere.py"),
    ({"task": "restore"}, "not one of autoencoder, skidnet"), ({"task": "restore", "arch": "skidnett"}, "Did you mean 'skidnet'?"),
    ({"task": "restore", "arch": "skidnet", "loss": "dice"}, "not one of auto, mse, l1, ssim"),
    ({"task": "restore", "arch": "skidnet", "encoder": "vgg16"}, "its own encoder"), ({"arch": "nafnet"}, "not one of unet"),
    ({"task": "restore", "arch": "skidnet", "stages": "tuned"}, "for networks in series, aggregated"),
    ({"task": "restore", "arch": "aggregated", "patience": 5}, "patience must be 0"),
    ({"task": "restore", "arch": "aggregated", "epochs": 1}, "epochs must be ≥ 2"), ({"stages": "appart"}, "Did you mean 'apart'?"),
    ({"optimizer": "adamax"}, "Did you mean 'adam"), ({"optimizer": "sgd", "weight_decay": .1}, "weight_decay must be 0"),
    ({"schedule": "plato"}, "cosine, plateau"), ({"augment": "gray"}, "Did you mean 'grey'?"),
    ({"noise_input": "imerkaer"}, "Did you mean 'immerkaer'?"), ({"checkpoint": "nowhere?arch&sed=1"}, "Did you mean 'seed'?"),
    ({"task": "restore", "arch": "skidnet", "noise_input": "immerkaer"}, "not for skidnet"),
    ({"checkpoint": "nowhere?task&arch=fpn"}, "must fit one finished run with seed 0, task lungs, arch fpn, and fits 0 of 0")]


@pytest.mark.parametrize("given, what", REFUSED, ids=[" ".join(map(str, g)) + str(k) for k, (g, _) in enumerate(REFUSED)])
def test_refused_in_one_line(given, what):
    with pytest.raises((ValueError, FileNotFoundError)) as e: check_parameters(given)
    assert what in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("given", [
    {}, {"task": "lungs_heart", "arch": "segformer", "train_noise": "0.5*clean+0.5*0..10,0..10", "ladder": "4,2 0,10"},
    {"task": "restore", "arch": "aggregated", "optimizer": "adam", "schedule": "plateau", "train_noise": "nonuniform", "denoiser": "nlm"},
    {"task": "restore", "arch": "sharp_unet", "encoder": "vgg16", "loss": "ssim", "ladder": "nonuniform_all"},
    {"task": "Effusion|Edema", "arch": "resnet34", "loss": "cross_entropy", "ladder": [[0, 0], [10, 0]], "seed": "7"}])
def test_settled_parameters_are_read_back_as_they_were_written(given):
    p = check_parameters(given)
    assert check_parameters(settings(p)) == p and check_parameters(settings(p)) is not p


def test_text_and_numbers_mean_the_same():
    same = [{"train_noise": text, "lr": lr, "ladder": ladder} for text, lr, ladder in
            (("0,10", 1e-3, "4,2"), ("0, 10.0", "0.001", [[4, 2]]), ("0,10", ".001", ["0,0", "4,2"]))]
    assert len({check_parameters(given) for given in same}) == 1


def test_every_field_is_described():
    for f in fields(Parameters):
        assert f.metadata["help"] and f.metadata["identity"] in (True, False, "dataset", "training"), f.name


def different(f, p):
    "Another value of a field's type."
    value = getattr(p, f.name)
    if isinstance(value, TrainNoise): return TrainNoise.parse("0,10")
    if isinstance(value, tuple): return (Severity(), Severity(3, 0))
    return value + 1 if isinstance(value, (int, float)) else "phantom" if f.name == "test_dataset" else "other"


def test_each_field_changes_the_identity_if_and_only_if_it_says_so():
    p = replace(check_parameters({}), dataset="folder")
    for f in fields(Parameters):
        if f.name in ("dataset", "extend", "phantoms"): continue                # another table of uses; needs a file; not used
        changed = identity(replace(p, **{f.name: different(f, p)})) != identity(p)
        assert changed == bool(f.metadata["identity"]), f.name


def test_a_given_checkpoint_replaces_all_that_is_for_training():
    p = replace(check_parameters({}), checkpoint="m.safetensors")
    for f in fields(Parameters):
        if f.metadata["identity"] == "training": assert identity(replace(p, **{f.name: different(f, p)})) == identity(p)


def test_files_count_by_their_contents(tmp_path):
    for name, content in ("a.safetensors", b"1"), ("b.safetensors", b"1"), ("c.safetensors", b"2"):
        (tmp_path/name).write_bytes(content)
    a, b, c = (identity(check_parameters({"weights": str(tmp_path/f"{name}.safetensors")})) for name in "abc")
    assert a == b != c
    a, b, c = (identity(check_parameters({"checkpoint": str(tmp_path/f"{name}.safetensors")})) for name in "abc")
    assert a == b != c


def test_a_denoiser_counts_by_its_contents_and_a_run_by_its_checkpoint(tmp_path):
    for name, content in ("a", b"1"), ("b", b"1"), ("c", b"2"):
        (tmp_path/name).mkdir()
        (tmp_path/name/"checkpoint.safetensors").write_bytes(content)
    a, b, c = (check_parameters({"denoiser": str(tmp_path/name)}) for name in "abc")
    assert identity(a) == identity(b) != identity(c) and identity(check_parameters({})) != identity(a)
    assert a == check_parameters({"denoiser": str(tmp_path/"a"/"checkpoint.safetensors")}) == check_parameters(settings(a))
    assert labels([a, check_parameters({"denoiser": "nlm"})]) == ["denoiser a", "denoiser nlm"]


def test_the_order_of_the_ladder_does_not_count_and_its_conditions_do():
    p = check_parameters({})
    assert identity(replace(p, ladder=LADDER[::-1])) == identity(p) != identity(replace(p, ladder=LADDER[:-1]))


def test_extensions_are_loaded_first_and_are_part_of_the_identity(tmp_path):
    (tmp_path/"more.py").write_text("from cxr_noise_study.noise import SOURCES, Source\n"
                                    "SOURCES.register(Source('salt_for_a_test', stage=50, unit='nothing', sample=lambda i, s, rng: i, "
                                    "law=None))\n")
    given = dict(extend=str(tmp_path/"more.py"), ladder="0,0 salt_for_a_test=3", train_noise="salt_for_a_test=0..3")
    p = check_parameters(given)
    assert str(p.ladder[1]) == "salt_for_a_test=3" and identity(p) != identity(replace(p, extend=""))
    assert check_parameters(settings(p)) == p


def test_labels_show_what_differs_and_nothing_else():
    rows = [check_parameters(dict(arch=arch, seed=seed, runs_dir=f"/{seed}")) for arch in ("unet", "fpn") for seed in (0, 1)]
    assert varied(rows) == ["arch", "seed"] == varied([settings(p) for p in rows])
    assert labels(rows) == ["unet, seed 0", "unet, seed 1", "fpn, seed 0", "fpn, seed 1"]
    assert labels(rows[:1]) == [""] and labels([]) == []


def test_external_options_keep_size_and_normalisation():
    p = check_parameters(dict(test_dataset="phantom", size=64))
    assert data_options(p, external=True) | dict(test_only=None) == data_options(p) | dict(test_only=None)


def test_each_architecture_fits_exactly_one_target():
    assert sorted(ARCHITECTURES) == sorted(name for table in HEADS.values() for name in table)
    assert {find_task(t).target for t in ("lungs", "Effusion|Edema", "restore")} == set(HEADS)
