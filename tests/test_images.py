"What killed and competing processes leave of files and stores, and which changes of code rebuild a store."
import os, signal, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cxr_noise_study
from cxr_noise_study.images import build_store, code_digest, decode_store, open_store, read_grey, remove_dead

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

BUILD = """
import sys, time, numpy as np
from pathlib import Path
from cxr_noise_study.images import build_store
def build(create):
    images = create("images", (4, 9, 9), np.uint8); images[:] = 5
    print("building", flush=True); time.sleep(float(sys.argv[2]))
    return {"images": images}
print(build_store({"a": 1}, build, Path(sys.argv[1]))["images"].sum(), flush=True)
"""
WRITE = """
import sys, time
from pathlib import Path
from cxr_noise_study.images import write_whole
def write(path): path.write_text("half"); print("writing", flush=True); time.sleep(60)
write_whole(Path(sys.argv[1]), write)
"""


def started(code, *words):
    "Start Python code and wait for its first line."
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().endswith("ing\n")
    return process


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@posix
def test_killed_build_leaves_no_store_and_the_next_one_cleans_up(tmp_path):
    kill(started(BUILD, tmp_path, 60))
    assert not list(tmp_path.glob("[!.]*")) and len(list(tmp_path.glob(".*.partial"))) == 1
    for said in ("building\n1620\n", "1620\n"):                                 # built, then opened
        done = subprocess.run([sys.executable, "-c", BUILD, tmp_path, "0"], capture_output=True, text=True, check=True)
        assert done.stdout == said and not list(tmp_path.glob(".*.partial"))


def test_two_builders_at_once_do_no_harm(tmp_path):
    both = [started(BUILD, tmp_path, 1) for _ in "ab"]
    assert [process.communicate(timeout=120)[0].split()[-1] for process in both] == ["1620", "1620"]
    assert len(list(tmp_path.glob("[!.]*"))) == 1 and not list(tmp_path.glob(".*.partial"))


@posix
def test_killed_write_leaves_the_old_file(tmp_path):
    (tmp_path/"a.txt").write_text("old")
    process = started(WRITE, tmp_path/"a.txt")
    assert remove_dead(tmp_path) == 0 and len(list(tmp_path.iterdir())) == 2     # the living keep theirs
    kill(process)
    assert (tmp_path/"a.txt").read_text() == "old"
    assert remove_dead(tmp_path) == 1 and list(tmp_path.iterdir()) == [tmp_path/"a.txt"]


@pytest.mark.parametrize("harm", ["cut", "byte", "card", "gone"])
def test_damaged_store_is_built_again_and_says_so(tmp_path, capsys, harm):
    def build(create): return {"images": np.arange(5000), "masks": np.ones(3)}
    build_store({}, build, tmp_path)
    [store] = tmp_path.glob("[!.]*")
    file = store/"images.npy"
    if harm == "cut": os.truncate(file, 1000)
    if harm == "byte": file.write_bytes(file.read_bytes()[:-9] + b"\x01" + file.read_bytes()[-8:])
    if harm == "card": (store/"store.json").write_text("{}")
    if harm == "gone": (store/"masks.npy").unlink()
    assert open_store(store) is None
    assert (build_store({}, build, tmp_path)["images"] == np.arange(5000)).all()
    assert "is damaged and is built again" in capsys.readouterr().out


def test_long_names_are_written_too(tmp_path):
    "A file system allows 255 bytes; the temporary name must not be longer than the final one."
    name = "ä"*125 + ".png"
    Image.fromarray(np.eye(9, dtype=np.uint8)*200).save(tmp_path/name)
    from cxr_noise_study.cli import main
    assert main(["corrupt", str(tmp_path/name), str(tmp_path/"out"/name), "-q", "4", "--quiet"]) == 0
    assert read_grey(tmp_path/"out"/name).shape == (9, 9)


def test_what_rebuilds_a_store(tmp_path, monkeypatch):
    "Help texts, docstrings and comments do not; the code that decodes does."
    package = tmp_path/"package"
    package.mkdir()
    for name in ("images", "cli"):
        (package/f"{name}.py").write_text(Path(cxr_noise_study.__file__).with_name(f"{name}.py").read_text())
    monkeypatch.setattr(cxr_noise_study, "__file__", str(package/"__init__.py"))
    def decode(i): return np.zeros((4, 4)), (4, 4)
    def count():
        decode_store({}, decode, (2, 0, 4), Path("films"), cache_dir=tmp_path/"cache")
        return len(list((tmp_path/"cache").glob("[!.]*")))
    def edit(name, old, new):
        text = (package/f"{name}.py").read_text()
        assert old in text
        (package/f"{name}.py").write_text(text.replace(old, new))
    assert count() == 1
    edit("cli", 'help="file or folder"', 'help="a file or a folder"')
    edit("images", '"Fill a closed contour at any scale."', '"Fill a contour."  # at any scale')
    assert count() == 1
    before = code_digest("images")
    edit("images", "Image.Resampling.BILINEAR", "Image.Resampling.BICUBIC")
    assert code_digest("images") != before and count() == 2
