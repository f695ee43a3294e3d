"04_sweep as its users run it: through papermill, from anywhere, killed, repeated, with wrong parameters."
import ast, json, random, re, shutil, signal, subprocess, sys, time

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from cxr_noise_study.datasets import load_radiographs
from cxr_noise_study.evaluation import evaluate, export_onnx
from cxr_noise_study.images import file_digest
from cxr_noise_study.networks import build_model, read_tensors, write_tensors
from cxr_noise_study.page import evaluate_folder
from cxr_noise_study.protocol import Parameters, check_parameters, settings
from cxr_noise_study.runs import clean_partial, compute_run, run_fault, set_aside
from tests.conftest import ROOT, SWEEP, TINY, papermill, papermill_command, runs

KEY = ["image_id", "condition", "replicate"]
HEADINGS = ["What was run", "Radiographs and patients", "Examples", "Curve", "Table", "Training", "Records"]


def page(file):
    "The outputs of an executed notebook: texts (Markdown, tables, streams) and how many pictures."
    cells = [c for c in nbformat.read(file, as_version=4).cells if c.cell_type == "code"]
    assert not [o.text for c in cells for o in c.outputs if o.get("name") == "stderr"]
    data = [o.get("data", {}) for c in cells for o in c.outputs]
    said = [o.get("text", "") for c in cells for o in c.outputs]
    texts = [d.get("text/markdown", d.get("text/html", d.get("text/plain", ""))) for d in data]
    return "\n".join([*said, *texts]), sum("image/png" in d for d in data)


def parameters_cell():
    cell = nbformat.read(SWEEP, as_version=4).cells[0]
    assert cell.metadata["tags"] == ["parameters"]
    return cell.source.splitlines()


def test_the_first_cell_lists_all_parameters_with_their_defaults():
    "papermill silently runs the defaults where this cell is not tagged."
    found = {}
    for line in parameters_cell():
        name, value, comment = re.fullmatch(r"(\w+): \w+ = (.+?) +# (.+)", line).groups()
        found[name] = ast.literal_eval(value)
        assert comment and "=" not in comment                   # papermill cannot parse a comment with one
    assert list(found) == list(settings(Parameters()))
    assert check_parameters(found) == check_parameters({})
    defaults = settings(Parameters())
    assert {k: v for k, v in found.items() if k != "ladder"} == {k: v for k, v in defaults.items() if k != "ladder"}


def test_the_page_is_a_report_without_machinery():
    cells = nbformat.read(SWEEP, as_version=4).cells
    headings = [h for c in cells if c.cell_type == "markdown" for h in re.findall(r"^## (.+)$", c.source, re.M)]
    assert headings == HEADINGS
    for cell in cells[1:]:
        code = [l for l in cell.source.splitlines() if l.strip() and not l.startswith("#|")]
        if cell.cell_type == "code": assert len(code) <= 3 and not re.search(r"\b(def|class|for|export)\b", cell.source)


@pytest.mark.parametrize("arch,task,columns", [("unet", "lungs_heart", {"dice", "iou", "area_pred", "area_true"}),
                                               ("resnet34", "Effusion|Edema", {"y_true", "y_score", "threshold", "finding"})])
def test_a_run_of_either_kind_leaves_records_and_a_page(tmp_path, arch, task, columns):
    done = papermill(tmp_path, arch=arch, task=task)
    assert done.returncode == 0, done.stderr[-2000:]
    [(card, records)] = runs(tmp_path)
    structures = {"lungs_heart": 2}.get(task, 1)
    assert len(records) == 2*6*2*structures and columns <= set(records)
    assert {"run", "dataset", "test_set", "task", "arch", "encoder", "weights", "seed", "replicate", "condition", "s_q", "s_e",
            "image_id", "patient_id", "source"} <= set(records)
    assert set(records.condition) == {"0,0", "10,0"} and set(card["conditions"]) == {"0,0", "10,0"}
    assert card["parameters"]["arch"] == arch and card["rows"] == len(records) and card["seconds"]["training"] > 0
    text, pictures = page(tmp_path/"out.ipynb")
    assert pictures == 3                                                        # examples, curve, history
    assert "The model was tested on 6 radiographs of 6 patients. It was trained on 28 radiographs of 28 patients" in text
    assert "6 test radiographs of 6 patients, one trained model, seed 0; 95 % patient-bootstrap intervals" in text
    assert "trivial predictor" in text and "quantum 10" in text and card["run"] in text


def test_a_run_restores_and_then_stands_before_a_model(tmp_path):
    "The network restores all five conditions of a ladder; a second run has it before its model, and refuses what does not fit."
    done = papermill(tmp_path, task="restore", arch="skidnet", train_noise="nonuniform", ladder="nonuniform")
    assert done.returncode == 0, done.stderr[-2000:]
    [(card, records)] = runs(tmp_path)
    text, pictures = page(tmp_path/"out.ipynb")
    assert pictures >= 2 and "The PSNR is" in text and "speckle at centre 3" in text and "Dice" not in text
    assert records.groupby("checkpoint").condition.nunique().to_dict() == {"best": 5, "swa": 5} and set(records.denoiser) == {""}
    assert {"mse", "psnr", "ssim", "haarpsi", "bias"} <= set(records) and np.allclose(records.psnr, -10*np.log10(records.mse))
    folder = next((tmp_path/"runs").glob("[!.]*"))
    behind = compute_run(check_parameters({**TINY, "denoiser": str(folder), "runs_dir": str(tmp_path/"behind")}))
    assert set(behind.records.denoiser) == {folder.name} and not (behind.folder/"validation.parquet").exists()
    assert json.loads((behind.folder/"run.json").read_text())["parameters"]["denoiser"].startswith(str(folder))
    for given, what in (dict(size=96), "was trained with size 64, but the images have size 96"), \
                       (dict(denoiser=str(behind.folder)), "is no run that restores"), (dict(denoiser="nml"), "Did you mean 'nlm'"), \
                       (dict(phantoms=60), "was trained on patients of"):
        with pytest.raises(ValueError, match=what) as e: compute_run(check_parameters({**TINY, "denoiser": str(folder), **given}))
        assert "\n" not in str(e.value)


def test_a_denoiser_stands_before_a_classifier(tmp_path):
    "A median filter, in training with noise and in testing; trained on clean images, the checkpoint does not ask for it."
    given = dict(TINY, denoiser="median", task="Effusion|Edema", arch="resnet34", runs_dir=str(tmp_path/"runs"))
    noisy, clean = (compute_run(check_parameters(given | dict(train_noise=noise))) for noise in ("10,0", "clean"))
    for run, asked in (noisy, "median"), (clean, ""):
        assert set(run.records.denoiser) == {"median"} and read_tensors(run.folder/"checkpoint.safetensors")[1]["denoiser"] == asked
        kept = pd.read_parquet(run.folder/"validation.parquet")
        assert len(kept) == 2*len(run.data.where("valid")) and set(kept.checkpoint) == {"best", "swa"} and set(kept.condition) == {"0,0"}
        assert "validation.parquet" in json.loads((run.folder/"run.json").read_text())["files"]
    tested = compute_run(check_parameters(given | dict(denoiser="", checkpoint=str(noisy.folder/"checkpoint.safetensors"))))
    assert set(tested.records.denoiser) == {"median"}                       # as it was trained
    best = noisy.records[noisy.records.checkpoint == "best"].sort_values(KEY)
    assert np.allclose(tested.records.sort_values(KEY).y_score, best.y_score)


def test_own_images_from_any_folder(tmp_path, folder):
    done = papermill(tmp_path, cwd=folder.parent, dataset="folder", data_dir=folder.name, task="lungs",
                     train_noise="0,10")
    assert done.returncode == 0, done.stderr[-2000:]
    [(card, records)] = runs(tmp_path)
    assert card["parameters"]["train_noise"] == "0,10" and set(records.dataset) == set(records.test_set) == {folder.name}
    images = pd.read_csv(next((tmp_path/"runs").glob("[!.]*"))/"images.csv")
    assert not set(records.image_id) & set(images.query("split != 'test'").image_id)


def test_unknown_parameter_is_refused_before_any_work(tmp_path):
    done = papermill(tmp_path, epoch=50)
    assert done.returncode != 0 and "Did you mean 'epochs'?" in done.stderr
    assert not (tmp_path/"runs").exists()


def test_external_evaluation_follows_the_card(tmp_path, folder):
    "A model trained on phantoms of 64 px, tested on all 40 images of a folder that has no training split of its own."
    manifest = pd.read_csv(folder/"manifest.csv").assign(split="test")
    other = tmp_path/"other"; other.mkdir()
    for kind in "images", "lungs", "heart": (other/kind).symlink_to(folder/kind)
    manifest.to_csv(other/"manifest.csv", index=False)
    external = dict(test_dataset="folder", test_dir=other)
    compute_run(check_parameters({**TINY, **external, "test_dir": str(other), "runs_dir": str(tmp_path/"runs")}))
    [(card, trained)] = runs(tmp_path)
    assert card["images"] == {"train": 28, "valid": 6, "test": 40} and len(trained) == 2*40*2
    assert set(trained.dataset) == {"phantom"} and set(trained.test_set) == {"other"}
    checkpoint = next((tmp_path/"runs").glob("[!.]*"))/"checkpoint.safetensors"
    again = dict(external, checkpoint=checkpoint, size=128, arch="fpn", runs_dir=tmp_path/"again"/"runs")
    done = papermill(tmp_path, **again)
    assert done.returncode == 0, done.stderr[-2000:]
    [(card, records)] = runs(tmp_path/"again")
    assert card["parameters"]["size"] == 64 and card["chosen"]["adapted"]["size"] == [128, 64]
    text, pictures = page(tmp_path/"out.ipynb")
    assert "size 64 instead of 128" in text and "arch unet instead of fpn" in text and pictures == 2    # no history
    assert set(records.arch) == {"unet"} and set(records.checkpoint) == {"best"} and card["images"] == {"test": 40}
    best = trained[trained.checkpoint == "best"].sort_values(KEY)
    assert np.allclose(records.sort_values(KEY).dice, best.dice)                                # as when it was trained
    with pytest.raises(ValueError, match="predicts lungs, but task heart needs heart"):
        compute_run(check_parameters({k: str(v) for k, v in {**TINY, **again, "task": "heart"}.items()}))


FLECK = """
import numpy as np
from cxr_noise_study.noise import SOURCES, Source
SOURCES.register(Source("fleck", stage=30, unit="SD in tenths of the intensity",
                        sample=lambda image, s, rng: image*(1 + .1*s*rng.standard_normal(image.shape))))
"""


def test_a_noise_source_of_a_file_is_trained_and_tested_on(tmp_path):
    (tmp_path/"my_noise.py").write_text(FLECK)
    asked = dict(extend=tmp_path/"my_noise.py", ladder="0,0 fleck=5", train_noise="fleck=0..5")
    done = papermill(tmp_path, **asked)
    assert done.returncode == 0, done.stderr[-2000:]
    [(card, records)] = runs(tmp_path)
    assert set(records.condition) == {"0,0", "fleck=5"} and set(records.train_noise) == {"fleck=0..5"}
    text, pictures = page(tmp_path/"out.ipynb")
    assert "fleck 5" in text and pictures == 3 and card["extension"]
    (tmp_path/"my_noise.py").write_text(FLECK.replace(".1*s", ".2*s"))                        # another noise, another run
    assert papermill(tmp_path, **asked).returncode == 0 and len(runs(tmp_path)) == 2
    unknown = papermill(tmp_path, ladder="0,0 fleck=5")
    assert unknown.returncode != 0 and "fleck" in unknown.stderr


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


def test_run_killed_again_and_again_ends_with_its_records(tmp_path):
    (tmp_path/"runs").mkdir()
    asked = {**TINY, "epochs": 5, "replicates": 20, "swa_start": 3, "train_noise": "ladder"}
    command = papermill_command(tmp_path/"out.ipynb", **asked, runs_dir=tmp_path/"runs")
    moments = random.Random()                                  # another moment each time: the test must hold at any
    behind, killed = pd.DataFrame(), 0
    while killed < 3:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if killed == 2: wait_for((tmp_path/"runs", ".*.partial/records-best.parquet"), process)    # once in evaluation
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
    [(card, records)] = runs(tmp_path)
    folder = next((tmp_path/"runs").glob("[!.]*"))
    pd.testing.assert_frame_equal(pd.read_csv(folder/"history.csv")[:len(behind)], behind)
    assert killed >= 1 and len(records) == 2*6*(1 + 20) and not records.duplicated(["checkpoint", *KEY]).any()
    assert sorted(f.name for f in folder.iterdir()) == ["checkpoint.safetensors", "history.csv", "images.csv",
                                                        "records.parquet", "run.json", "swa.safetensors"]
    assert not list((tmp_path/"runs").glob(".*.partial"))
    done = papermill(tmp_path, **{**asked, "runs_dir": tmp_path/"again"/"runs"})
    assert done.returncode == 0, done.stderr[-2000:]
    [(_, unbroken)] = runs(tmp_path/"again")
    pd.testing.assert_frame_equal(records.drop(columns="run"), unbroken.drop(columns="run"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("protocol,arch", [("paper_segmentation", "unet"), ("paper_classification", "resnet34")])
def test_protocol_of_the_paper_runs_offline(tmp_path, protocol, arch):
    given = dict(TINY, arch=arch, epochs=2, weights="none", size=128, runs_dir=tmp_path/"runs")
    command = papermill_command(tmp_path/"out.ipynb", **given)
    done = subprocess.run([*command, "-f", str(ROOT/"nbs"/"params"/f"{protocol}.yaml")], cwd=tmp_path,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    [(card, records)] = runs(tmp_path)
    asked = card["parameters"]
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
    [(card, _)] = runs(tmp_path)
    texts = [page(tmp_path/f"{k}.ipynb")[0] for k in range(2)]
    assert sum("was computed before and read from disk" in text for text in texts) == 1
    assert not list((tmp_path/"runs").glob(".*.partial"))
    assert run_fault(next((tmp_path/"runs").glob("[!.]*"))) == ""     # the second left all as it was


def test_damage_is_found_and_nothing_is_built_on_it(tmp_path):
    run = tmp_path/"run"; run.mkdir()
    for name in ("checkpoint.safetensors", "records.parquet"): (run/name).write_bytes(name.encode())
    files = {name: file_digest(run/name) for name in ("checkpoint.safetensors", "records.parquet")}
    (run/"run.json").write_text(json.dumps(dict(run="run", rows=1, parameters={}, files=files)))
    assert run_fault(run) == ""
    (run/"records.parquet").write_bytes(b"other")
    assert "records.parquet is not the file" in run_fault(run)
    set_aside(run, "for the test")
    assert not run.exists() and (tmp_path/".run.damaged-1").is_dir()
    for half in (["checkpoint.safetensors", "history.csv", "records.parquet"],
                 ["state.safetensors", "best-0001.safetensors"]):
        partial = tmp_path/f".{half[0]}.partial"; partial.mkdir()
        for name in half: (partial/name).write_bytes(b"half")
        clean_partial(partial)                                      # nothing in it can be read: nothing stays
        assert not list(partial.iterdir())
    partial = tmp_path/".whole.partial"; partial.mkdir()
    write_tensors(partial/"state.safetensors", {"a": torch.ones(2)}, {})
    for name in ".cxr-noise-host-17-ab.partial", ".other.partial": (partial/name).write_bytes(b"half")
    clean_partial(partial)                                          # what a killed process was writing goes
    assert [f.name for f in partial.iterdir()] == ["state.safetensors"]


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    "A network for two outputs, and its file, which takes any number of images of 64 px."
    network = build_model("unet", outputs=2).eval()
    return network, export_onnx(network, tmp_path_factory.mktemp("onnx")/"two.onnx", (1, 64, 64), traced=True)


def test_14_4_an_onnx_file_and_a_folder_give_records_table_curve_and_page(onnx_file, folder, tmp_path):
    network, file = onnx_file
    html = evaluate_folder(file, folder, tmp_path/"report", task="lungs,heart", ladder="0,0 4,2", progress=False).read_text()
    records = pd.read_parquet(tmp_path/"report"/"records.parquet")
    data = load_radiographs("folder", "lungs_heart", folder, 64, test_only=True)
    expected = evaluate(network, data, conditions="0,0 4,2", progress=False)
    assert len(records) == 40*2*2 and set(records.model) == {"two.onnx"} and set(records.dataset) == {folder.name}
    assert np.allclose(records.dice, expected.dice, atol=1e-3)
    summary = pd.read_csv(tmp_path/"report"/"summary.csv")
    assert {"lungs", "heart", "mean of structures"} == set(summary.output) and "floor" in summary
    assert html.count("<svg") == 1 and html.count("<table") == 2 and "trivial predictor" in html and "<script" not in html
    assert "two.onnx on " in html and "40 test radiographs of 40 patients" in html and "quantum 4, electronic 2" in html


def test_14_4_findings_by_name(folder, tmp_path):
    file = export_onnx(build_model("resnet34", weights="none", outputs=2).eval(), tmp_path/"two.onnx", (1, 64, 64), traced=True)
    evaluate_folder(file, folder, tmp_path/"report", task="Effusion, Edema", ladder="0,0 4,2", progress=False)
    records = pd.read_parquet(tmp_path/"report"/"records.parquet")
    assert records.groupby("finding").y_true.mean().to_dict() == {"Edema": .5, "Effusion": .5}
    assert {"auroc", "auprc", "f1"} <= set(pd.read_csv(tmp_path/"report"/"summary.csv").metric)


def test_14_4_names_are_escaped(onnx_file, folder, tmp_path):
    odd = tmp_path/"<img src=x onerror=alert(1)>"
    shutil.copytree(folder, odd); shutil.copy(onnx_file[1], tmp_path/"<b>$x.onnx")
    manifest = pd.read_csv(odd/"manifest.csv").rename(columns={"heart": "<i>$\\frac$"}); manifest.to_csv(odd/"manifest.csv", index=False)
    page = evaluate_folder(tmp_path/"<b>$x.onnx", odd, tmp_path/"report", task="lungs,<i>$\\frac$", ladder="0,0 4,2", progress=False)
    assert not re.search("<img|<b>|<i>", page.read_text()) and "&lt;img src=x" in page.read_text()


def test_14_4_a_killed_evaluation_resumes(onnx_file, folder, tmp_path, capsys):
    code = ("import sys, time; from cxr_noise_study import page; whole = page.OnnxModel.__call__\n"
            "def slow(self, x): time.sleep(.05); return whole(self, x)\n"
            "page.OnnxModel.__call__ = slow; page.evaluate_folder(*sys.argv[1:], task='lungs_heart')")
    command = [sys.executable, "-c", code, str(onnx_file[1]), str(folder), str(tmp_path/"report")]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try: wait_for((tmp_path/"report"/"batches", "00001*.parquet"), process)
    finally: process.send_signal(signal.SIGKILL); process.communicate()
    kept = {f.name: f.stat().st_mtime_ns for f in (tmp_path/"report"/"batches").glob("0*.parquet")}
    assert 2 <= len(kept) < 3 and not (tmp_path/"report"/"report.html").exists()
    evaluate_folder(onnx_file[1], folder, tmp_path/"report", task="lungs_heart")
    assert "evaluating" in capsys.readouterr().err                                  # the bar
    assert all((tmp_path/"report"/"batches"/name).stat().st_mtime_ns == t for name, t in kept.items())
    assert len(pd.read_parquet(tmp_path/"report"/"records.parquet")) == 40*14*2 and (tmp_path/"report"/"report.html").exists()


@pytest.mark.parametrize("given, what", [
    (dict(task="lungz"), "no image is labelled 'lungz'"), (dict(output="logit"), "Did you mean 'logits'"),
    (dict(size=96), "takes ['images', 1, 64, 64]"), (dict(task="lungs"), "one channel or logit for each of lungs"),
    (dict(data_dir="nowhere"), "nowhere"), (dict(model="nowhere.onnx"), "nowhere.onnx")])
def test_14_4_what_does_not_fit_is_refused_in_one_line(onnx_file, folder, tmp_path, given, what):
    with pytest.raises((ValueError, OSError)) as e:
        evaluate_folder(**dict(model=onnx_file[1], data_dir=folder, out=tmp_path/"report", ladder="0,0", progress=False) | given)
    assert what in str(e.value) and "\n" not in str(e.value) and not (tmp_path/"report"/"report.html").exists()
