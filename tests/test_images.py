"What killed processes leave of files and stores, which changes of code rebuild a store, and hostile files."
import json, os, signal, subprocess, sys, tracemalloc
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

import cxr_noise_study
from cxr_noise_study.images import (build_store, code_digest, decode_store, open_store, read_grey, read_radiograph,
                                    read_record, remove_dead, square)

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

BUILD = """
import sys, time, numpy as np
from pathlib import Path
from cxr_noise_study.images import build_store
def build(create):
    images = create("images", (4, 9, 9), np.uint8); images[:] = 5
    print("building", flush=True); time.sleep(float(sys.argv[2]))
    while len(sys.argv) > 3 and not Path(sys.argv[3]).exists(): time.sleep(.01)
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
    both = [started(BUILD, tmp_path/"stores", 0, tmp_path/"go") for _ in "ab"]
    (tmp_path/"go").touch()
    assert [process.communicate(timeout=120)[0].split()[-1] for process in both] == ["1620", "1620"]
    assert len(list(tmp_path.glob("stores/[!.]*"))) == 1 and not list(tmp_path.glob("stores/.*.partial"))


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


# ---- hostile input

def test_14_11_extreme_shapes_are_refused_before_they_are_padded():
    tracemalloc.start()
    for shape in ((40000, 8), (8, 40000)):
        with pytest.raises(ValueError, match=f"is {shape[0]}×{shape[1]} pixels: one side is more than 20 times the other"):
            square(np.zeros(shape, np.float32), 64)
    assert tracemalloc.get_traced_memory()[1] < 4*2**20                              # padded it would be 6 GB
    tracemalloc.stop()
    assert square(np.zeros((400, 40)), 64).shape == (64, 64)


def film(**more):
    "A DICOM image, 12 of 16 bits, with a ramp."
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 32, 128, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = np.arange(4096, dtype="<u2").tobytes()
    ds["PixelData"].VR, ds.preamble = "OW", bytes(128)
    for keyword, value in more.items():
        if value is None: delattr(ds, keyword)
        else: setattr(ds, keyword, value)
    return ds


@pytest.mark.parametrize("photometric,slope,rises", [("MONOCHROME2", "1", True), ("MONOCHROME2", "-1", False),
                                                     ("MONOCHROME1", "2.5", False), ("MONOCHROME1", "-0.5", True)])
def test_14_14_a_negative_slope_means_the_same_everywhere(tmp_path, photometric, slope, rises):
    "For the loader, which reads greys, and for the command line, which counts photons where it is bright."
    film(PhotometricInterpretation=photometric, RescaleSlope=slope).save_as(tmp_path/"a.dcm", enforce_file_format=True)
    ramp = np.linspace(0, 1, 4096).reshape(32, 128)[::1 if rises else -1, ::1 if rises else -1]
    for normalise in (False, True): assert abs(read_radiograph(tmp_path/"a.dcm", normalise=normalise).intensity - ramp).max() < 1e-9
    assert abs(read_grey(tmp_path/"a.dcm", full_scale=True) - ramp).max() < 1e-6
    grey = read_grey(tmp_path/"a.dcm")
    assert abs((grey - grey.min())/np.ptp(grey) - ramp).max() < 1e-6


@pytest.mark.parametrize("harm,reason", [
    (dict(Rows=None), "has no Rows"), (dict(BitsStored=None), "has no BitsStored"), (dict(BitsStored=0), "has BitsStored 0"),
    (dict(BitsStored=20), "has BitsStored 20, allowed are 1 to 16"), (dict(SOPClassUID=None), "has no SOPClassUID"),
    (dict(PixelRepresentation=None, BitsAllocated=None), "has no BitsAllocated and no PixelRepresentation"),
    (dict(SamplesPerPixel=None), "cannot be used"), (dict(PixelData=b"\0"*10), "bytes"), (dict(PixelData=b""), "has no pixel data"),
    (dict(HighBit=15), "has HighBit 15 with BitsStored 12, allowed is 11"), (dict(RescaleSlope=0), "has a RescaleSlope of 0"),
    (dict(PixelData=bytes(2*8192)), "holds 16,384 bytes of pixels, its header states 8,192")])
def test_14_14_missing_and_wrong_elements_are_named(tmp_path, harm, reason):
    film(**harm).save_as(tmp_path/"a.dcm", enforce_file_format=False)
    for read in (read_radiograph, read_grey):
        with pytest.raises(ValueError, match=reason) as raised: read(tmp_path/"a.dcm")
        words = str(raised.value)
        assert "\n" not in words and not any(f"{name}Error" in words for name in ("Attribute", "Type", "Key", "Value"))
    with pytest.raises(ValueError, match="a.dcm"): read_radiograph(tmp_path/"a.dcm")


def test_14_14_numbers_that_are_no_numbers_are_named(tmp_path):
    ds = film()
    for keyword, tag, text in (("RescaleSlope", b"\x28\x00\x53\x10DS", b"1.25"), ("NumberOfFrames", b"\x28\x00\x08\x00IS", b"1 ")):
        ds = film(**{keyword: text.decode().strip()})
        ds.save_as(tmp_path/"a.dcm", enforce_file_format=True)
        raw = (tmp_path/"a.dcm").read_bytes()
        assert raw.count(tag) == 1
        at = raw.index(tag) + 8
        (tmp_path/"a.dcm").write_bytes(raw[:at] + b"x"*len(text) + raw[at + len(text):])
        with pytest.raises(ValueError, match=f"a.dcm: has a {keyword} that is not a number"): read_radiograph(tmp_path/"a.dcm")


def test_14_14_a_long_derivation_keeps_its_record(tmp_path):
    "The standard allows 1,024 characters; the record is the part that a later run needs."
    film(DerivationDescription="x"*1000).save_as(tmp_path/"a.dcm", enforce_file_format=True)
    a, record = read_radiograph(tmp_path/"a.dcm"), {"s_q": 4.0, "image_id": "a"*500}
    a.save(a.pixels, tmp_path/"b.dcm", None, json.dumps(record))
    text = pydicom.dcmread(tmp_path/"b.dcm").DerivationDescription
    assert len(text) <= 1024 and text.startswith("xxx") and read_record(tmp_path/"b.dcm") == record
    b = read_radiograph(tmp_path/"b.dcm")
    with pytest.raises(ValueError, match="derivation description of .* characters, allowed are 1024"):
        b.save(b.pixels, tmp_path/"c.dcm", None, json.dumps({"s_q": 4.0, "image_id": "a"*1000}))


def test_14_14_a_single_image_type_stays_a_word(tmp_path):
    film(ImageType="ORIGINAL").save_as(tmp_path/"a.dcm", enforce_file_format=True)
    a = read_radiograph(tmp_path/"a.dcm")
    a.save(a.pixels, tmp_path/"b.dcm", None, "{}")
    assert list(pydicom.dcmread(tmp_path/"b.dcm").ImageType) == ["DERIVED", "PRIMARY"]


def test_14_14_what_cannot_be_decoded_is_said(tmp_path):
    "A stream that no decoder here reads, or that is no stream, is not called a file of another kind."
    for syntax in (pydicom.uid.JPEGLSLossless, pydicom.uid.JPEG2000Lossless, pydicom.uid.MPEG2MPML):
        ds = film()
        ds.file_meta.TransferSyntaxUID, ds.PixelData = syntax, pydicom.encaps.encapsulate([b"no stream at all"])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
        ds.save_as(tmp_path/"a.dcm", enforce_file_format=True)
        with pytest.raises(ValueError, match="a.dcm: cannot be decoded"): read_radiograph(tmp_path/"a.dcm")


def test_14_14_an_empty_lookup_table_is_none(tmp_path):
    film(ModalityLUTSequence=[]).save_as(tmp_path/"a.dcm", enforce_file_format=True)
    assert read_radiograph(tmp_path/"a.dcm").white == 4095 and read_grey(tmp_path/"a.dcm").max() == 4095
