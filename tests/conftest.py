"Fixtures for what no notebook can hold: papermill runs, killed processes, broken files."
import json, os, subprocess, sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from cxr_noise_study.phantom import phantom

ROOT = Path(__file__).resolve().parent.parent
SWEEP = ROOT/"nbs"/"04_sweep.ipynb"
TINY = dict(size=64, phantoms=40, epochs=1, ladder="0,0 10,0", precision="fp32", device="cpu")


def papermill_command(out, **parameters):
    "The command line of one sweep."
    given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    return [str(Path(sys.executable).parent/"papermill"), "--no-progress-bar", str(SWEEP), str(out), *given]


def papermill(tmp, cwd=None, **parameters):
    "Run one small sweep below `tmp` and return the finished process."
    parameters = {**TINY, "runs_dir": tmp/"runs", **parameters}
    return subprocess.run(papermill_command(tmp/"out.ipynb", **parameters), cwd=cwd or tmp, capture_output=True,
                          text=True, timeout=600)


def runs(tmp):
    "The finished runs below `tmp`: run.json → records."
    found = sorted((tmp/"runs").glob("[!.]*/run.json"))
    return [(json.loads(f.read_text()), pd.read_parquet(f.parent/"records.parquet")) for f in found]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    "Forty radiographs with masks and labels, described by a manifest."
    root = tmp_path_factory.mktemp("mine")
    made, rows = phantom(40, size=64), []
    for kind in ("images", "lungs", "heart"): (root/kind).mkdir()
    for i in range(40):
        for kind, array in ("images", made.images[i]), ("lungs", made.lungs[i]*255), ("heart", made.heart[i]*255):
            Image.fromarray(array).save(root/kind/f"{i}.png")
        rows.append(dict(image=f"images/{i}.png", patient_id=f"p{i}", source="here", lungs=f"lungs/{i}.png",
                         heart=f"heart/{i}.png",
                         labels=["Edema", "Effusion"][i % 2]))
    pd.DataFrame(rows).to_csv(root/"manifest.csv", index=False)
    return root


@pytest.fixture(scope="session")
def real_data():
    "The folder of real radiographs, where there is one."
    where = os.environ.get("CXR_REAL_DATA")
    if not where: pytest.skip("CXR_REAL_DATA names no folder of real radiographs")
    return Path(where)
