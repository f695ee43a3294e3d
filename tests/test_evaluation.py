"What no notebook can hold: a killed grid, engines on a whole network, attacks on a user's own arrays, models of all kinds."
import re, runpy, signal, subprocess, sys, time, warnings
from importlib.util import find_spec

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from cxr_noise_study.channel import corrupt
from cxr_noise_study.evaluation import (ENGINES, OnnxModel, candidates, engine_model, evaluate, evaluate_robustness, export_onnx,
                                        load_denoiser, predict)
from cxr_noise_study.datasets import load_radiographs
from cxr_noise_study.images import square
from cxr_noise_study.networks import build_model, save_checkpoint
from cxr_noise_study.noise import Severity
from cxr_noise_study.phantom import phantom
from cxr_noise_study.statistics import summarise
from tests.conftest import ROOT

GRID = """
import sys, time
import numpy as np, torch
from cxr_noise_study.evaluation import evaluate_robustness
from cxr_noise_study.phantom import phantom
made = phantom(12, size=64)
def darker(x):
    time.sleep(.02)
    return .45 - x
evaluate_robustness(darker, made.images, made.lungs, output="logits", channels=1, batch_size=2, path=sys.argv[1],
                    name="darker", progress=False)
"""


def test_a_killed_grid_keeps_whole_batches_and_resumes(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", GRID, str(tmp_path)], cwd=tmp_path)
    try:
        deadline = time.time() + 120
        while len(list(tmp_path.glob("0*.parquet"))) < 2 and time.time() < deadline: time.sleep(.01)
    finally: process.send_signal(signal.SIGKILL); process.wait()
    kept = {f: f.stat().st_mtime_ns for f in tmp_path.glob("0*.parquet")}
    assert 2 <= len(kept) < 6 and all(len(pd.read_parquet(f)) == 2*14 for f in kept)       # each one whole
    made, calls = phantom(12, size=64), []
    def counted(x): calls.append(len(x)); return darker(x)
    own = dict(output="logits", channels=1, batch_size=2, progress=False, name="darker")
    resumed = evaluate_robustness(counted, made.images, made.lungs, path=tmp_path, **own)
    assert all(f.stat().st_mtime_ns == written for f, written in kept.items())             # read, not computed again
    assert len(calls) == 14*(6 - len(kept))
    pd.testing.assert_frame_equal(resumed, evaluate_robustness(darker, made.images, made.lungs, **own))


MADE = phantom(4, size=64)


def darker(x): return .45 - x


@pytest.mark.parametrize("wrong,what", [
    (dict(output="logit"), "Did you mean 'logits'?"), (dict(channels=2), "channels"), (dict(output="probabilities"), "are these logits?"),
    (dict(targets=MADE.lungs[1:]), "got 3, 4 and 4"), (dict(images=MADE.images/255), "must be 8-bit grey"),
    (dict(image_ids=["a"]*4), "got 4, 1 and 4"), (dict(targets=MADE.lungs*255), "must be 0 and 1"),
    (dict(structures=["a", "b"]), "got 2 names"), (dict(path="never made"), "needs `name`"), (dict(ladder=["x"]), "x"),
    (dict(targets=np.eye(4)[:, :, None, None, None]), "targets of shape"), (dict(engine="onnx"), "cannot run a function"),
    (dict(metrics=["dise"]), "Did you mean 'dice'"), (dict(metrics="dise"), "Did you mean 'dice'"),
    (dict(replicates=0), "replicates must be ≥ 1"), (dict(replicates=1.5), "replicates 1.5 is not a whole number"),
    (dict(replicate=2), "Did you mean 'replicates'?"), (dict(metrix=["dice"]), "Did you mean 'metrics'?"), (dict(select=""), "select must be None, got ''"),
    (dict(image_ids=[1, 2, 3, float("nan")]), "whole numbers or texts, got nan"),
    (dict(denoiser="nml"), "Did you mean 'nlm'?"), (dict(denoiser="nowhere/checkpoint.safetensors"), "neither a finished run"),
    (dict(denoiser=__file__), "test_evaluation.py"), (dict(denoiser=lambda images, severity: images[:1]), "the denoiser must return"),
    (dict(denoiser=lambda images, severity: images, path="never made"), "needs `name`"),
    (dict(batch_size=0), "batch_size must be ≥ 1"), (dict(images=[], targets=[]), "at least one image"),
    (dict(targets=MADE.lungs[:, :32]), "needs targets of shape")])
def test_wrong_arguments_are_refused_in_one_line(wrong, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = dict(images=MADE.images, targets=MADE.lungs, output="logits", channels=1, progress=False, ladder="0,0 0,1")
    with pytest.raises(ValueError) as e: evaluate_robustness(darker, **given | wrong)
    assert what in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("metrics", [["iou"], "iou"])
def test_chosen_metrics_only(metrics):
    records = evaluate_robustness(darker, MADE.images, MADE.lungs, "0,0 0,1", output="logits", channels=1, metrics=metrics,
                                  progress=False)
    assert {"iou", "floor_iou"} <= set(records) and not {"dice", "hd95", "nsd"} & set(records)


QUIET = dict(progress=False, channels=1)


def test_14_1_several_findings_are_scored_in_one_inference():
    labels, calls = np.array([[0, 1], [1, 1], [0, 0], [1, 0]]), []
    def network(x):
        calls.append(len(x))
        return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1)
    records = evaluate_robustness(network, MADE.images, labels, "0,0 4,2", output="logits", structures=["Edema", "Mass"], **QUIET)
    assert sum(calls) == 4*2 and records.groupby("finding").size().to_dict() == {"Edema": 8, "Mass": 8}
    values = summarise(records, resamples=20).query("condition == '4,2'").set_index(["metric", "output"]).value
    for metric in "auroc", "auprc":
        assert values[metric, "mean of findings"] == pytest.approx((values[metric, "Edema"] + values[metric, "Mass"])/2)


CLASSES = MADE.lungs.astype(int) + 2*((MADE.heart > 0) & (MADE.lungs == 0))                 # 0 background, 1 lungs, 2 heart
ONE_HOT = np.stack([CLASSES == k for k in range(3)], 1).astype(np.uint8)
NAMES = ["lungs", "heart"]


def oracle(x):
    "Softmax logits of a perfect network: the highest is right, and none of the three lies above 0 where x is black."
    return torch.from_numpy(ONE_HOT.astype(np.float32))*2 - 3 + 4*(x > .5)


@pytest.mark.parametrize("model", [oracle, lambda x: oracle(x).argmax(1), lambda x: oracle(x).argmax(1, keepdim=True).float()],
                         ids=["scores", "map", "map with an axis"])
@pytest.mark.parametrize("targets", [CLASSES, torch.from_numpy(CLASSES), [*CLASSES], ONE_HOT[:, 1:]],
                         ids=["map", "tensor", "list", "masks"])
def test_14_1_of_several_classes_the_highest_counts(model, targets):
    records = evaluate_robustness(model, MADE.images, targets, "0,0 1,0", output="classes", structures=NAMES, **QUIET)
    assert (records.dice == 1).all() and records.groupby("structure").size().to_dict() == {"lungs": 8, "heart": 8}
    assert (records[records.structure == "lungs"].area_true.to_numpy()[:4] == (CLASSES == 1).sum((1, 2))).all()


def test_14_1_a_background_with_its_own_target_is_a_structure_like_others():
    records = evaluate_robustness(oracle, MADE.images, ONE_HOT, "0,0", output="classes", structures=["rest", *NAMES], **QUIET)
    assert (records.dice == 1).all() and len(records) == 3*4


@pytest.mark.parametrize("targets, structures, what", [
    (CLASSES + 1, NAMES, "has class 3, but only 2 are named"), ([*CLASSES], None, "needs structures"),
    (np.eye(4, dtype=int), None, "the model returns"), (ONE_HOT[:, 1:2], ["lungs"], "expected (n, 1 classes")])
def test_14_1_wrong_classes_are_refused(targets, structures, what):
    with pytest.raises(ValueError) as e:
        evaluate_robustness(oracle, MADE.images, targets, "0,0", output="classes", structures=structures, **QUIET)
    assert what in str(e.value) and "\n" not in str(e.value)


def test_14_1_a_table_of_findings_names_them():
    table = pd.DataFrame({"Edema": [0, 1, 0, 1], "Mass": [1, 1, 0, 0]})
    def network(x): return torch.stack([x.mean((1, 2, 3))]*2, 1)
    records = evaluate_robustness(network, MADE.images, table, "0,0", output="logits", **QUIET)
    assert records.groupby("finding").y_true.apply(list).to_dict() == {name: table[name].tolist() for name in table}


@pytest.mark.parametrize("model, images, what", [
    (lambda x: None, MADE.images, "must return one array, got a NoneType"), (oracle, MADE.images[:0], "of at least one image"),
    (oracle, iter(MADE.images), "of at least one image, got")])
def test_14_1_no_answer_and_no_images_are_refused_in_one_line(model, images, what):
    with pytest.raises(ValueError, match=what) as e:
        evaluate_robustness(model, images, MADE.lungs, "0,0", output="logits", **QUIET)
    assert "\n" not in str(e.value)


def test_14_1_one_hot_targets_and_raw_scores_give_a_warning():
    with pytest.warns(UserWarning, match="output='classes' takes the highest"):
        records = evaluate_robustness(oracle, MADE.images, ONE_HOT, "0,0", output="logits", **QUIET)
    assert records.dice.mean() < .8                                     # what was silent: a perfect network, read wrongly
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*softmax")
        evaluate_robustness(oracle, MADE.images, ONE_HOT, "0,0", output="classes", **QUIET)


class Net(nn.Module):
    "A network with dropout and batch statistics that returns two arrays."
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(.5), nn.Conv2d(4, 1, 1))

    def forward(self, x): return {"aux": x, "out": self.layers(x)}


def scores(model, images=MADE.images[:3], targets=MADE.lungs[:3], **options):
    given = dict(QUIET, output="logits") | options
    return evaluate_robustness(model, images, targets, "0,0 4,2", **given)


@pytest.fixture(scope="module")
def network(): return Net().layers.eval()


@pytest.fixture(scope="module")
def expected(network): return scores(network)


def same(records, expected):
    pd.testing.assert_frame_equal(records.drop(columns="model"), expected.drop(columns="model"), atol=1e-3)


def test_14_2_a_torchscript_or_exported_program(network, expected):
    x = torch.rand(2, 1, 64, 64)
    images = torch.export.Dim("images", max=64)
    for model in (torch.jit.trace(network, x), torch.jit.freeze(torch.jit.script(network)), torch.export.export(network, (x,)),
                  torch.export.export(network, (x,), dynamic_shapes=({0: images},))):
        same(scores(model, batch_size=3), expected)                     # three images, of a program made for two


def test_14_2_an_onnx_file_or_session(network, expected, tmp_path):
    export_onnx(network, tmp_path/"any.onnx", (1, 64, 64), traced=True)
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(network, (torch.rand(2, 1, 64, 64),), str(tmp_path/"two.onnx"), dynamo=False)
    for name in "any.onnx", "two.onnx":
        for model in tmp_path/name, str(tmp_path/name), onnxruntime.InferenceSession(tmp_path/name):
            records = scores(model, batch_size=3)
            same(records, expected)
        assert set(scores(tmp_path/name).model) == {name}
    with pytest.raises(ValueError, match=re.escape("[2, 1, 64, 64]")) as e: scores(tmp_path/"two.onnx", channels=3)
    assert "\n" not in str(e.value)
    (tmp_path/"text.onnx").write_text("not a model")
    for name in "text.onnx", "nowhere.onnx":
        with pytest.raises(ValueError, match=name) as e: scores(tmp_path/name)
        assert "\n" not in str(e.value)


def test_14_2_another_onnx_file_of_the_same_name_is_computed_anew(network, expected, tmp_path):
    other = nn.Sequential(nn.Conv2d(1, 1, 1)).eval()
    for model in network, other, network:
        export_onnx(model, tmp_path/"m.onnx", (1, 64, 64), traced=True)
        same(scores(tmp_path/"m.onnx", path=tmp_path/"grid"), expected if model is network else scores(other))
    assert len(list((tmp_path/"grid").glob("0*.parquet"))) == 2


def test_14_2_estimators_and_pipelines_of_scikit_learn():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (60, 8, 8)).astype(np.uint8)
    labels = rng.integers(0, 2, (60, 2)); labels[:4] = [[0, 0], [0, 1], [1, 0], [1, 1]]
    flat = x.reshape(60, -1)/np.float32(255)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(flat, labels[:, 0])
    forest = RandomForestClassifier(5, random_state=0).fit(flat, labels)
    for output, wanted in ("probabilities", pipeline.predict_proba(flat)[:, 1]), ("logits", pipeline.decision_function(flat)):
        records = scores(pipeline, x, labels[:, 0], output=output, channels=3, batch_size=60).query("condition == '0,0'")
        score = wanted if output == "probabilities" else 1/(1 + np.exp(-wanted))
        assert np.allclose(records.y_score, score, atol=1e-5) and set(records.model) == {"Pipeline"}
    both = scores(forest, x, labels, output="probabilities", batch_size=60).query("condition == '0,0'")
    assert np.allclose(both.y_score, np.concatenate([each[:, 1] for each in forest.predict_proba(flat)]))
    with pytest.raises(ValueError, match="needs decision_function"): scores(forest, x, labels)


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_14_2_a_network_is_given_back_as_it_came(engine, expected):
    net = Net().train()
    net.layers[1].eval()                                                # a frozen normalisation stays frozen
    before = {name: t.clone() for name, t in net.state_dict().items()}
    same(scores(net, select="out", engine=engine).assign(engine="torch"), expected)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert net.training and net.layers[2].training and not net.layers[1].training


def test_14_2_the_mode_comes_back_after_a_failure():
    net = Net().train()
    with pytest.raises(ValueError, match="select, one of 'aux', 'out'"): scores(net)
    assert all(part.training for part in net.modules())


UNEVEN = [MADE.images[0], np.pad(MADE.images[1], ((0, 0), (8, 24))), MADE.images[2][:40]]
UNEVEN_MASKS = [MADE.lungs[0], np.pad(MADE.lungs[1], ((0, 0), (8, 24))), MADE.lungs[2][:40]]


def test_14_3_images_of_several_sizes_are_resized_with_their_masks(tmp_path):
    by_hand = [np.stack([square(item, 32) for item in items]) for items in (UNEVEN, UNEVEN_MASKS)]
    images, masks = np.rint(by_hand[0]).astype(np.uint8), (by_hand[1] >= .5).astype(np.uint8)
    wanted = scores(darker, images, masks)
    pd.testing.assert_frame_equal(scores(darker, UNEVEN, UNEVEN_MASKS, size=32), wanted)
    files = [[tmp_path/f"{kind}{k}.png" for k in range(3)] for kind in "im"]
    for k in range(3):
        Image.fromarray(UNEVEN[k]).save(files[0][k]); Image.fromarray(UNEVEN_MASKS[k]*255).save(files[1][k])
    pd.testing.assert_frame_equal(scores(darker, pd.Series(files[0], index=[7, 8, 9]), files[1], size=32), wanted)
    two = [np.stack([mask, mask]) for mask in UNEVEN_MASKS]
    both = scores(lambda x: darker(x).repeat(1, 2, 1, 1), UNEVEN, two, size=32)
    assert both.dice.tolist()[:3] == both.dice.tolist()[3:6] == wanted.dice.tolist()[:3]


def test_whole_numbers_name_the_same_images_as_integers():
    a, b = (evaluate_robustness(darker, MADE.images, MADE.lungs, "0,4", output="logits", image_ids=ids, **QUIET)
            for ids in ([4, 3, 2, 1], [4., 3., 2., 1.]))
    pd.testing.assert_frame_equal(a, b)


def test_a_network_restores_before_a_model_whatever_runs_it(tmp_path):
    "Each engine gives the same images within one grey level, and the model behind it the same scores within .01."
    restorer = build_model("skidnet")
    about = dict(arch="skidnet", encoder="skidnet", outputs=["image"], task="restore", size=64, normalise="min-max")
    file = save_checkpoint(restorer.eval(), tmp_path/"checkpoint.safetensors", **about)
    noisy = corrupt(MADE.images, Severity(4, 2), list("abcd"))
    images = {engine: load_denoiser(file, 64, engine=engine)(noisy, Severity(4, 2)).astype(int) for engine in ENGINES if find_spec(ENGINES[engine][0])}
    assert all(abs(image - images["torch"]).max() <= 1 for image in images.values())
    model = build_model("fpn", weights="none").eval()
    dice = [scores(model, denoiser=file, engine=engine).dice for engine in ("torch", "onnx")]
    assert np.allclose(*dice, atol=.01)
    with pytest.raises(ValueError, match="trained with size 64, but the images have size 32"):
        scores(model, [image[:32, :32] for image in MADE.images], MADE.lungs[:, :32, :32], denoiser=tmp_path)


def test_14_3_without_a_size_the_error_names_it():
    with pytest.raises(ValueError, match="size=256") as e: scores(darker, UNEVEN, UNEVEN_MASKS)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("ids", [[5, 3, 9], np.array([5, 3, 9]), torch.tensor([5, 3, 9]), pd.Series([5, 3, 9], index=[2, 1, 0]),
                                 ["5", "3", "9"]], ids=["list", "array", "tensor", "series", "texts"])
def test_14_3_image_ids_key_the_same_noise_as_in_corrupt(ids):
    seen = []
    def watch(x): seen.append((x[:, 0]*255).round().byte().numpy()); return darker(x)
    records = scores(watch, image_ids=ids, seed=2)
    assert np.array_equal(seen[1], corrupt(MADE.images[:3], Severity(4, 2), image_ids=np.asarray(ids), seed=2))
    assert records.image_id.tolist()[:3] == np.asarray(ids).tolist()
    assert summarise(records, resamples=5).images.eq(3).all()


def test_14_3_a_ladder_is_a_list_of_texts_too():
    assert set(evaluate_robustness(darker, MADE.images, MADE.lungs, ["0,0"], output="logits", **QUIET).condition) == {"0,0"}
    records = evaluate_robustness(darker, MADE.images, MADE.lungs, ["4,2", (1, 0)], output="logits", **QUIET)
    assert set(records.condition) == {"0,0", "4,2", "1,0"}


@pytest.mark.parametrize("recipe, library", [("monai_model", "monai"), ("torchxrayvision_model", "torchxrayvision")])
def test_14_5_the_recipes_run(recipe, library, capsys):
    pytest.importorskip(library, reason=f"the recipe for {library} needs it: pip install {library}")
    runpy.run_path(str(ROOT/"examples"/f"{recipe}.py"), run_name="__main__")
    assert "0,0" in (text := capsys.readouterr().out) and "4,2" in text
    code = [line for line in (ROOT/"examples"/f"{recipe}.py").read_text().splitlines()[1:] if line.strip()]
    assert len(code) <= 11                                              # ten lines, and a title


@pytest.mark.parametrize("arch", ["unet", "resnet34", "vit_tiny"])
def test_engines_agree_on_whole_networks(arch):
    model = build_model(arch, weights="none").eval()
    for engine, precision in candidates(model, "auto", "auto", "cpu"):
        if engine == "torch": continue
        ours = predict(engine_model(model, engine, precision, MADE.images[:2]), MADE.images)
        theirs = predict(model, MADE.images)
        assert np.abs(ours - theirs).max() <= {"fp32": 1e-3, "bf16": .05}[precision]*max(theirs.std(), 1e-2)*2


def test_records_do_not_depend_on_threads_or_batches():
    data = load_radiographs("phantom", "lungs", size=64, phantoms=40)
    model = build_model("unet", "resnet18", "none").eval()
    tables = []
    for threads, batch_size in (1, 2), (2, 5):
        before = torch.get_num_threads(); torch.set_num_threads(threads)
        try:
            table = evaluate(model, data, conditions="0,0 10,0 0,10", batch_size=batch_size, engine="onnx", precision="fp32",
                             progress=False)
        finally: torch.set_num_threads(before)
        tables.append(table.sort_values(["image_id", "condition"], ignore_index=True))
    pd.testing.assert_frame_equal(*tables, atol=2e-3)


@pytest.mark.parametrize("empty", [None, float("nan"), ""])
def test_patients_without_a_name_are_not_one_patient(empty):
    images, masks = np.zeros((3, 32, 32), np.uint8), np.zeros((3, 32, 32), np.uint8)
    with pytest.raises(ValueError, match="2 patient_ids are empty"):
        evaluate_robustness(lambda x: x, images, masks, "0,0", output="logits", patient_ids=["a", empty, empty])


def test_weights_in_a_file_beside_the_model_count(tmp_path):
    "The same .onnx file with other weights beside it is another model: nothing that was kept of the first is read."
    onnx, digests = pytest.importorskip("onnx"), []
    for slope in (1., 2.):
        weight = onnx.numpy_helper.from_array(np.full((1,), slope, np.float32), "w")
        graph = onnx.helper.make_graph([onnx.helper.make_node("Mul", ["x", "w"], ["y"])], "g",
                                       [onnx.helper.make_tensor_value_info("x", 1, ["n", 1, 8, 8])],
                                       [onnx.helper.make_tensor_value_info("y", 1, ["n", 1, 8, 8])], [weight])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
        (tmp_path/"w.data").unlink(missing_ok=True)
        onnx.save_model(model, tmp_path/"m.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
        digests.append(((tmp_path/"m.onnx").read_bytes(), OnnxModel(tmp_path/"m.onnx").digest))
    assert digests[0][0] == digests[1][0] and digests[0][1] != digests[1][1]


@pytest.mark.parametrize("engine", [name for name, (package, _) in ENGINES.items() if name != "torch" and find_spec(package)])
def test_18_a_network_that_is_told_the_noise_level_is_the_same_in_every_engine(engine):
    model = build_model("unet", noise_input="immerkaer").eval()
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    torch.nn.init.normal_(first.weight.data[:, 3:], generator=torch.Generator().manual_seed(0))
    run = engine_model(model, engine, "fp32", MADE.images[:2])
    for condition in "0,0", "0,1", "10,0":                  # other levels than those that it was traced with
        noisy = corrupt(MADE.images, Severity.parse(condition), [*"abcd"])
        expected = predict(model, noisy)
        np.testing.assert_allclose(predict(run, noisy), expected, atol=1e-3*expected.std())
    first.weight.data[:, 3:] = 0
    assert abs(predict(model, noisy) - expected).max() > .1*expected.std()
