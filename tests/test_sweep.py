"04_sweep as its users run it: through papermill, from anywhere, killed, repeated, asked for nonsense."
import json, subprocess, time

import nbformat
import pandas as pd
import psutil
import pytest

from cxr_noise_study.sweep import file_digest, mend, run_fault, set_aside
from tests.conftest import TINY, papermill, papermill_command, runs

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
    assert len(records) == 6*2*structures and columns <= set(records)
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


def test_killed_run_goes_on_and_equals_an_unbroken_one(tmp_path):
    (tmp_path/"runs").mkdir()
    command = papermill_command(tmp_path/"out.ipynb", **{**TINY, "replicates": 20, "runs_dir": tmp_path/"runs"})
    for milestone in (".*.partial/history.csv", ".*.partial/trained.json"):    # killed in training, then in evaluation
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for((tmp_path/"runs", milestone), process)
        for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
            victim.kill()                                                        # the kernel, and papermill
        process.wait()
        assert not runs(tmp_path)                                                # nothing under the final name
    def trained_at(folder): return next((tmp_path/"runs").glob(f"{folder}/checkpoint.safetensors")).stat().st_mtime_ns
    trained = trained_at(".*.partial")
    done = papermill(tmp_path, replicates=20)
    assert done.returncode == 0, done.stderr[-2000:]
    [(told, records)] = runs(tmp_path)
    assert trained_at("[!.]*") == trained                                        # not a second time
    assert len(records) == 6*(1 + 20) and not records.duplicated(KEY).any()
    done = papermill(tmp_path, replicates=20, runs_dir=tmp_path/"again"/"runs")
    [(_, unbroken)] = runs(tmp_path/"again")
    pd.testing.assert_frame_equal(records.drop(columns="run"), unbroken.drop(columns="run"), rtol=1e-3, atol=1e-3)


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
    assert run_fault(next((tmp_path/"runs").glob("[!.]*"))) == ""     # the second left the first one's files as they were


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
    partial = tmp_path/".p.partial"; partial.mkdir()
    for name in ("checkpoint.safetensors", "history.csv", "records.parquet"): (partial/name).write_bytes(b"half")
    (partial/"trained.json").write_text('{"training": 1}')
    mend(partial)                                                                # no whole model: nothing made from it stays
    assert not list(partial.iterdir())
