"What no notebook can hold: a killed grid, engines on a whole network, attacks on a user's own arrays."
import signal, subprocess, sys, time

import numpy as np
import pandas as pd
import pytest
import torch

from cxr_noise_study.evaluation import Stack, candidates, engine_model, evaluate, evaluate_robustness, predict
from cxr_noise_study.datasets import load_radiographs
from cxr_noise_study.networks import build_model
from cxr_noise_study.phantom import phantom

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


def test_a_killed_grid_keeps_whole_batches_and_resumes(tmp_path):
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


MADE = phantom(4, size=64)


def darker(x): return .45 - x


@pytest.mark.parametrize("wrong,what", [
    (dict(output="logit"), "Did you mean 'logits'?"), (dict(channels=2), "channels"), (dict(output="probabilities"), "are these logits?"),
    (dict(targets=MADE.lungs[1:]), "got 3, 4 and 4"), (dict(images=MADE.images/255), "must be 8-bit grey"),
    (dict(image_ids=["a"]*4), "got 4, 1 and 4"), (dict(targets=MADE.lungs*255), "must be 0 and 1"),
    (dict(structures=["a", "b"]), "got 2 names"), (dict(path="never made"), "needs `name`"), (dict(ladder=["x"]), "x"),
    (dict(targets=np.eye(4)[:, :, None, None, None]), "targets of shape"), (dict(engine="onnx"), "cannot run a function"),
    (dict(metrics=["dise"]), "Did you mean 'dice'"), (dict(replicates=0), "replicates must be ≥ 1"),
    (dict(batch_size=0), "batch_size must be ≥ 1"), (dict(images=[], targets=[]), "no images"),
    (dict(targets=MADE.lungs[:, :32]), "needs targets of shape")])
def test_wrong_arguments_are_refused_in_one_line(wrong, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = dict(images=MADE.images, targets=MADE.lungs, output="logits", channels=1, progress=False, ladder="0,0 0,1")
    with pytest.raises(ValueError) as e: evaluate_robustness(darker, **given | wrong)
    assert what in str(e.value) and "\n" not in str(e.value)


def test_chosen_metrics_only():
    records = evaluate_robustness(darker, MADE.images, MADE.lungs, "0,0 0,1", output="logits", channels=1, metrics=["iou"],
                                  progress=False)
    assert {"iou", "floor_iou"} <= set(records) and not {"dice", "hd95", "nsd"} & set(records)


def test_images_of_several_sizes_are_refused():
    with pytest.raises(ValueError, match="must all have"): Stack([MADE.images[0], MADE.images[1][:32]])[[0, 1]]


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
