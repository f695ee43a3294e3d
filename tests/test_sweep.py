"04_sweep as its users run it: through papermill, from anywhere, killed, repeated, asked for nonsense."
import json, random, subprocess, time

import nbformat
import pandas as pd
import psutil
import pytest
import torch

from cxr_noise_study.sweep import file_digest, mend, run_fault, set_aside
from cxr_noise_study.training import write_tensors
from tests.conftest import ROOT, TINY, papermill, papermill_command, runs

KEY = ["image_id", "s_q", "s_e", "replicate"]


@pytest.mark.parametrize("arch,task,columns", [("unet", "lungs_heart", {"dice", "iou", "area_pred", "area_true"}),
                                               ("fpn", "heart", {"dice"}),
                                               ("deeplabv3", "lungs", {"dice"}),
                                               ("resnet34", "Effusion|Edema", {"y_true", "y_score", "threshold"})])
def test_every_architecture_of_the_paper(tmp_path, arch, task, columns):
    done = papermill(tmp_path, arch=arch, task=task)
    assert done.returncode == 0, done.stderr[-2000:]
    [(told, records)] = runs(tmp_path)
    structures = {"lungs_heart": 2}.get(task, 1)
    assert len(records) == 2*6*2*structures and columns <= set(records)
    assert {"run", "dataset", "task", "arch", "encoder", "weights", "seed", "replicate", "s_q", "s_e", "image_id",
            "patient_id", "source"} <= set(records)
    assert told["parameters"]["arch"] == arch and told["rows"] == len(records) and told["seconds"]["training"] > 0
    notebook = nbformat.read(tmp_path/"out.ipynb", as_version=4)
    pictures = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs
                if "image/png" in o.get("data", {})]
    assert len(pictures) >= 3                                                    # history, curve, examples


def test_own_images_from_any_folder(tmp_path, folder):
    done = papermill(tmp_path, cwd=folder.parent, dataset="folder", data_dir=folder.name, task="lungs",
                     train_noise="0,10")
    assert done.returncode == 0, done.stderr[-2000:]
    [(told, records)] = runs(tmp_path)
    assert told["parameters"]["train_noise"] == "0,10" and set(records.dataset) == {folder.name}
    images = pd.read_csv(next((tmp_path/"runs").glob("[!.]*"))/"images.csv")
    assert not set(records.image_id) & set(images.query("split != 'test'").image_id)


def test_unknown_parameter_is_refused_before_any_work(tmp_path):
    done = papermill(tmp_path, epoch=50)
    assert done.returncode != 0 and "Did you mean 'epochs'?" in done.stderr
    assert not (tmp_path/"runs").exists()


def wait_for(path, process, seconds=300):
    "Wait until a file is there, while the process lives."
    end = time.time() + seconds
    while time.time() < end:
        if found := list(path[0].glob(path[1])): return found[0]
        assert process.poll() is None, process.stderr.read()[-2000:]
        time.sleep(.02)
    raise AssertionError(f"{path[1]} did not appear")


def kill(process):
    "Kill a papermill and its kernel, with no chance to tidy up."
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]: victim.kill()
    process.wait()


def test_run_killed_five_times_ends_with_its_records(tmp_path):
    (tmp_path/"runs").mkdir()
    asked = {**TINY, "epochs": 8, "replicates": 40, "swa_start": 3, "train_noise": "ladder"}
    command = papermill_command(tmp_path/"out.ipynb", **asked, runs_dir=tmp_path/"runs")
    moments = random.Random()                                  # another moment each time: the test must hold at any
    behind, killed = pd.DataFrame(), 0
    while killed < 5:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if killed == 4: wait_for((tmp_path/"runs", ".*.partial/records-best.parquet"), process)    # once in evaluation
        else:
            wait_for((tmp_path/"runs", ".*.partial"), process)
            time.sleep(moments.uniform(0, 4))
        if process.poll() is not None: break                   # it was quicker than we were
        kill(process); killed += 1
        assert not runs(tmp_path)                              # nothing under the final name
        if found := list((tmp_path/"runs").glob(".*.partial/history.csv")):
            history = pd.read_csv(found[0])
            if len(behind): pd.testing.assert_frame_equal(history[:len(behind)], behind)    # no epoch was run twice
            behind = history
    done = papermill(tmp_path, **asked)
    assert done.returncode == 0, done.stderr[-2000:]
    [(told, records)] = runs(tmp_path)
    folder = next((tmp_path/"runs").glob("[!.]*"))
    pd.testing.assert_frame_equal(pd.read_csv(folder/"history.csv")[:len(behind)], behind)
    assert killed >= 1 and len(records) == 2*6*(1 + 40) and not records.duplicated(["checkpoint", *KEY]).any()
    assert sorted(f.name for f in folder.iterdir()) == ["checkpoint.safetensors", "history.csv", "images.csv",
                                                        "records.parquet", "run.json", "swa.safetensors"]
    assert not list((tmp_path/"runs").glob(".*.partial"))
    done = papermill(tmp_path, **{**asked, "runs_dir": tmp_path/"again"/"runs"})
    assert done.returncode == 0, done.stderr[-2000:]
    [(_, unbroken)] = runs(tmp_path/"again")
    pd.testing.assert_frame_equal(records.drop(columns="run"), unbroken.drop(columns="run"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("protocol,arch", [("paper_segmentation", a) for a in ("unet", "deeplabv3", "fpn")]
                         + [("paper_classification", a) for a in ("resnet34", "densenet121", "efficientnet_b0")])
def test_protocol_of_the_paper_runs_offline(tmp_path, protocol, arch):
    given = dict(arch=arch, epochs=2, weights="none", size=128, phantoms=40, quantum="0,10", electronic=0,
                 precision="fp32", device="cpu", runs_dir=tmp_path/"runs")
    command = papermill_command(tmp_path/"out.ipynb", **given)
    done = subprocess.run([*command, "-f", str(ROOT/"nbs"/"params"/f"{protocol}.yaml")], cwd=tmp_path,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    [(told, records)] = runs(tmp_path)
    asked = told["parameters"]
    assert (asked["arch"], asked["lr"], asked["patience"], asked["epochs"]) == (arch, 1e-4, 10, 2)
    assert asked["encoder"] == ("resnet34" if protocol == "paper_segmentation" else arch)
    assert asked["loss"] == ("dice" if protocol == "paper_segmentation" else "bce")
    assert set(records.checkpoint) == {"best", "swa"}


def test_finished_run_is_read_and_two_at_once_compute_one(tmp_path):
    (tmp_path/"runs").mkdir()
    both = [subprocess.Popen(papermill_command(tmp_path/f"{k}.ipynb", **{**TINY, "runs_dir": tmp_path/"runs"}),
                             stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True, cwd=tmp_path) for k in range(2)]
    for process in both: assert process.wait(600) == 0, process.stderr.read()[-2000:]
    [(told, _)] = runs(tmp_path)
    said = ["".join(o.get("text", "") for c in nbformat.read(tmp_path/f"{k}.ipynb", as_version=4).cells
                    if c.cell_type == "code" for o in c.outputs) for k in range(2)]
    assert sum("was computed before" in text for text in said) == 1
    assert not list((tmp_path/"runs").glob(".*.partial"))
    assert run_fault(next((tmp_path/"runs").glob("[!.]*"))) == ""     # the second left all as it was


def test_damage_is_seen_and_not_built_upon(tmp_path):
    run = tmp_path/"run"; run.mkdir()
    for name in ("checkpoint.safetensors", "records.parquet"): (run/name).write_bytes(name.encode())
    told = dict(run="run", rows=1, parameters={}, checkpoint=file_digest(run/"checkpoint.safetensors"),
                records=file_digest(run/"records.parquet"))
    (run/"run.json").write_text(json.dumps(told))
    assert run_fault(run) == ""
    (run/"records.parquet").write_bytes(b"other")
    assert "records.parquet is not the file" in run_fault(run)
    set_aside(run, "for the test")
    assert not run.exists() and (tmp_path/".run.damaged-1").is_dir()
    for half in (["checkpoint.safetensors", "history.csv", "records.parquet"],
                 ["state.safetensors", "best-0001.safetensors"]):
        partial = tmp_path/f".{half[0]}.partial"; partial.mkdir()
        for name in half: (partial/name).write_bytes(b"half")
        mend(partial)                                                            # nothing that can be believed: nothing stays
        assert not list(partial.iterdir())
    partial = tmp_path/".whole.partial"; partial.mkdir()
    write_tensors(partial/"state.safetensors", {"a": torch.ones(2)}, {})
    for name in ".records-best.parquet.17.partial", ".state.safetensors.17.partial": (partial/name).write_bytes(b"half")
    mend(partial)                                        # what a killed process was writing goes, what it had written stays
    assert [f.name for f in partial.iterdir()] == ["state.safetensors"]
