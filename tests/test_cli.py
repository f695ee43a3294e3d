"What the command line leaves behind: killed runs, full disks, broken files, DICOM headers; on images made here."
import errno, math, os, re, signal, subprocess, sys, time
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian,
                         ImplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless, generate_uid)

from cxr_noise_study.channel import corrupt
from cxr_noise_study.cli import Recipe, convert_files, main, noisy_pixels
from cxr_noise_study.images import read_radiograph, read_record
from cxr_noise_study.noise import N0, SIGMA0, SOURCES, Severity

CLI = [sys.executable, "-m", "cxr_noise_study.cli"]
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def chest(k, size=256):
    "A smooth image with two dark fields, different for each k."
    y, x = np.mgrid[-1:1:size*1j, -1:1:size*1j]
    lungs = sum(np.exp(-((x - c)**2/.06 + (y + .02*k % .3)**2/.3)) for c in (-.45, .45))
    return np.clip(200 - 160*lungs + 10*x, 0, 255).astype(np.uint8)


def tree(folder):
    "Every file below a folder: relative name → bytes."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def cli(*words):
    "Run a command line in this process; return exit code, standard output and standard error."
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try: code = main([str(word) for word in words])
        except SystemExit as e: code = e.code
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    "60 pictures in three folders, and what an undisturbed run makes of them."
    root = tmp_path_factory.mktemp("many")
    for k in range(60):
        name = root/"in"/("", "left", "left/deep")[k % 3]/f"{k:02d}{('.png', '.tif')[k % 2]}"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chest(k, 512)).save(name)
    outcome = convert_files(str(root/"in"), str(root/"calm"), Recipe(Severity(4, 2)), workers=1)
    assert (len(outcome.written), outcome.failed) == (60, [])
    return root


# ---- the same bytes, however they are made

def test_workers_and_order_do_not_matter(many, tmp_path):
    for workers in (2, 3):
        outcome = convert_files(str(many/"in"), str(tmp_path/str(workers)), Recipe(Severity(4, 2)), workers=workers)
        assert len(outcome.written) == 60
        assert tree(tmp_path/str(workers)) == tree(many/"calm")


def test_one_by_one_equals_the_folder(many, tmp_path):
    for name, content in list(tree(many/"calm").items())[::-7]:
        out = tmp_path/"one"/Path(name).name
        assert cli("corrupt", many/"in"/name, out, "-q", 4, "-e", 2, "--image-id", name).returncode == 0
        assert out.read_bytes() == content


def test_fields_are_those_of_the_library(many):
    for name in tree(many/"calm"):
        clean, noisy = (np.asarray(Image.open(many/folder/name)) for folder in ("in", "calm"))
        assert (noisy == corrupt(clean[None], Severity(4, 2), [name])[0]).all()


# ---- runs that are interrupted

def heed_ctrl_c():
    "Undo what a shell does to the jobs that it starts in the background: they, and all they start, ignore Ctrl-C."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(many, out, *more):
    "Start a run in a process group of its own and wait until some files are there."
    run = subprocess.Popen([*CLI, "corrupt", str(many/"in"), str(out), "-q", "4", "-e", "2", "--workers", "2", *more],
                           start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           preexec_fn=heed_ctrl_c)
    limit = time.monotonic() + 60
    while len([p for p in out.rglob("[0-9]*") if p.is_file()]) < 4:
        assert run.poll() is None and time.monotonic() < limit, run.communicate()
        time.sleep(.002)
    return run


def group_is_gone(pgid, seconds=20):
    "Tell whether all processes of a group have ended within some seconds."
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try: os.killpg(pgid, 0)
        except ProcessLookupError: return True
        time.sleep(.05)
    return False


def check_and_resume(many, out):
    "Only whole files stand under final names; --resume writes the others, and nothing is left over."
    calm, cut = tree(many/"calm"), tree(out)
    whole = {name: content for name, content in cut.items() if not name.endswith(".partial")}
    assert 4 <= len(whole) < 60 and all(calm[name] == content for name, content in whole.items())
    times = {name: (out/name).stat().st_mtime_ns for name in whole}
    refused = cli("corrupt", many/"in", out, "-q", 4, "-e", 2)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    other = cli("corrupt", many/"in", out, "-q", 4, "-e", 1, "--resume")
    assert other.returncode == 2 and "s_e 2.0 in place of 1.0" in other.stderr
    again = cli("corrupt", many/"in", out, "-q", 4, "-e", 2, "--resume")
    assert again.returncode == 0 and f"{len(whole)} kept" in again.stdout, again
    assert tree(out) == calm
    assert all((out/name).stat().st_mtime_ns == t for name, t in times.items())


@posix
def test_killed_run(many, tmp_path):
    run = started(many, tmp_path/"out")
    os.kill(run.pid, signal.SIGKILL)                                   # the main process alone: its workers must follow
    run.wait()
    assert group_is_gone(run.pid), "workers outlive the run that started them"
    check_and_resume(many, tmp_path/"out")


@posix
def test_killed_group(many, tmp_path):
    run = started(many, tmp_path/"out")
    os.killpg(run.pid, signal.SIGKILL)                                 # all at once, in the middle of files
    run.wait()
    assert group_is_gone(run.pid)
    check_and_resume(many, tmp_path/"out")


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run(many, tmp_path, number):
    run = started(many, tmp_path/"out")
    (os.killpg if number == signal.SIGINT else os.kill)(run.pid, number)   # Ctrl-C reaches the group
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "--resume" in err and "Traceback" not in err, err
    assert group_is_gone(run.pid)
    assert not list((tmp_path/"out").rglob("*.partial"))
    check_and_resume(many, tmp_path/"out")


@linux
def test_killed_worker(many, tmp_path):
    run = started(many, tmp_path/"out")
    child = int(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()[0])
    os.kill(child, signal.SIGKILL)                                     # as the kernel does when memory runs out
    out, err = run.communicate(timeout=60)
    assert run.returncode == 1 and "worker process was killed" in err and "Traceback" not in err, err
    assert group_is_gone(run.pid)
    check_and_resume(many, tmp_path/"out")


@posix
@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk(many, tmp_path, workers):
    import resource
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))   # no file may grow beyond 50 kB
    run = subprocess.run([*CLI, "corrupt", str(many/"in"), str(tmp_path/"out"), "-q", "4", "--workers", str(workers)],
                         preexec_fn=limit, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and os.strerror(errno.EFBIG) in run.stderr and "Traceback" not in run.stderr, run.stderr
    assert tree(tmp_path/"out") == {}


def test_full_disk_in_words(tmp_path, monkeypatch, capsys):
    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/a.png")
    Image.fromarray(chest(0)).save(tmp_path/"a.png")
    monkeypatch.setattr(os, "replace", full)
    assert main(["corrupt", str(tmp_path/"a.png"), str(tmp_path/"out"/"a.png"), "-q", "4"]) == 1
    assert os.strerror(errno.ENOSPC) in capsys.readouterr().err
    assert tree(tmp_path/"out") == {}


@pytest.fixture
def small_disk(tmp_path):
    "A disk of 256 kiB, too small for 400 × 400 pixels of 16 bit in noise."
    place = tmp_path/"disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)])


@posix
@pytest.mark.parametrize("line,again", [
    ("corrupt in/a.tif disk/b.tif -q 9", "--resume"), ("corrupt in disk/out -q 9 --workers 1", "--resume"),
    ("corrupt in/c.dcm disk/c.dcm -q 9 --deidentify", "--resume"), ("ladder in/a.tif -o disk/l.png --size 400", "the same command"),
    ("denoise in disk/out -q 9 --method median", "--resume")])
def test_14_18_a_small_disk(tmp_path, small_disk, monkeypatch, capfd, line, again):
    "One line that names the file, whatever writes it; what stands under a final name is whole, and IN is as it was."
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    deep = np.random.default_rng(0).integers(0, 65536, (400, 400), dtype=np.uint16)
    Image.fromarray(deep).save("in/a.tif"), Image.fromarray((deep >> 8).astype(np.uint8)).save("in/0.png")
    dicom(deep, 16).save_as("in/c.dcm", enforce_file_format=True)
    before = tree(tmp_path/"in")
    assert main(line.split()) == 1
    said = capfd.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1, said
    assert re.search(rf"{os.strerror(errno.ENOSPC)}: 'disk/.*([abc]\.\w+|l.png)'; .*{again} does", said.err), said
    assert tree(tmp_path/"in") == before
    assert {*tree(small_disk)} <= {"out/0.png", *["out/a.tif"]*("denoise" in line)}
    for name in tree(small_disk): assert read_radiograph(small_disk/name).pixels.shape == (400, 400)


@posix
@pytest.mark.parametrize("line", ["info 4 2", "--version", "corrupt in out -q 4"])
def test_14_18_the_screen_is_a_full_disk(tmp_path, line):
    run = shell(f"cxr-noise {line} > /dev/full", tmp_path, PYTHONUNBUFFERED="")
    assert (tmp_path/"code").read_text().strip() == "1"
    last = run.stderr.splitlines()[-1]
    assert os.strerror(errno.ENOSPC) in last and "<stdout>" in last and "Traceback" not in run.stderr, run
    assert (tmp_path/"out"/"z.png").exists() == line.startswith("corrupt")


# ---- nothing is overwritten

def test_outputs_are_not_overwritten(many, tmp_path):
    source, out = tmp_path/"in", tmp_path/"out"
    source.mkdir(), out.mkdir()
    for k in range(5): Image.fromarray(chest(k, 64)).save(source/f"{k}.png")
    (out/"3.png").write_bytes(b"precious")
    for more in ((), ("--resume",)):                                   # --resume keeps only its own files
        run = cli("corrupt", source, out, "-q", 4, *more)
        assert run.returncode == 2 and "3.png" in run.stderr
        assert tree(out) == {"3.png": b"precious"}                     # checked for all before any work
    assert cli("corrupt", source, out, "-q", 4, "--force").returncode == 0
    assert len(tree(out)) == 5 and tree(out)["3.png"] != b"precious"


def test_inputs_are_not_overwritten(tmp_path):
    (tmp_path/"a"/"a").mkdir(parents=True)
    for name in ("a/x.png", "a/a/x.png"): Image.fromarray(chest(0, 64)).save(tmp_path/name)
    before = tree(tmp_path)
    for source, out in (("a", "a"), ("a", "a/out"), ("a/x.png", "a"), ("a/x.png", "a/x.png"), ("a/a", "a/a/b/..")):
        run = cli("corrupt", tmp_path/source, tmp_path/out, "-q", 4, "--force")
        assert run.returncode == 2 and tree(tmp_path) == before, (source, out, run.stderr)
    (tmp_path/"link").symlink_to(tmp_path/"a", target_is_directory=True)
    assert cli("corrupt", tmp_path/"a", tmp_path/"link", "-q", 4, "--force").returncode == 2
    assert tree(tmp_path/"a") == {k.removeprefix("a/"): v for k, v in before.items()}


def test_png_names_that_collide(tmp_path):
    (tmp_path/"in").mkdir()
    for name in ("x.png", "x.jpg", "y.jpeg"): Image.fromarray(chest(0, 64)).save(tmp_path/"in"/name)
    run = cli("corrupt", tmp_path/"in", tmp_path/"out", "-q", 4, "--png")
    assert run.returncode == 2 and "several inputs would write" in run.stderr and not (tmp_path/"out").exists()
    (tmp_path/"in"/"x.jpg").unlink()
    assert cli("corrupt", tmp_path/"in", tmp_path/"out", "-q", 4, "--png").returncode == 0
    assert set(tree(tmp_path/"out")) == {"x.png", "y.png"}
    assert read_record(tmp_path/"out"/"y.png")["image_id"] == "y.jpeg"


# ---- bad files

def test_bad_files_are_named_and_the_others_go_on(tmp_path):
    source = tmp_path/"in"
    source.mkdir()
    good = dict.fromkeys(("a.png", "b.jpg", "c.tif"))
    for name in good: Image.fromarray(chest(1, 128)).save(source/name)
    for name in good: (source/f"half-{name}").write_bytes((source/name).read_bytes()[:-700])
    dicom(chest(1, 128), 8).save_as(source/"d.dcm", enforce_file_format=True)
    (source/"half-d.dcm").write_bytes((source/"d.dcm").read_bytes()[:-700])
    (source/"head-d.dcm").write_bytes((source/"d.dcm").read_bytes()[:200])
    (source/"empty.png").touch()
    (source/"text.png").write_text("not a picture")
    (source/"text.dcm").write_text("not a DICOM file")
    Image.fromarray(np.stack([chest(1), chest(2), chest(3)], -1)).save(source/"colour.png")
    (source/"folder.png").mkdir()
    Image.fromarray(chest(2)).save(source/".hidden.png")
    (source/"readme.txt").write_text("left alone")
    bad = {p.name for p in source.iterdir() if p.name.startswith(("half", "head", "empty", "text", "colour"))}
    for workers in (1, 2):
        run = cli("corrupt", source, tmp_path/f"out{workers}", "-q", 4, "--workers", workers)
        assert run.returncode == 1 and "Traceback" not in run.stderr
        lines = [line for line in run.stderr.splitlines() if line.startswith(str(source))]
        assert {Path(line.split(": ")[0]).name for line in lines} == bad and len(lines) == len(bad), run.stderr
        assert all(len(line.split(": ", 1)[1]) > 10 for line in lines)                    # each with a reason
        assert set(tree(tmp_path/f"out{workers}")) == {*good, "d.dcm"}
        assert f"{len(bad)} failed" in run.stdout and "1 other files" in run.stdout


# ---- pictures

def test_picture_metadata(tmp_path):
    exif = Image.Exif()
    exif[274], exif[271] = 6, "maker"                                   # orientation: turn by 90°; make
    im = Image.fromarray(chest(0, 128)[:96])
    im.save(tmp_path/"a.jpg", exif=exif, dpi=(200, 100))
    im.save(tmp_path/"a.tif", tiffinfo={270: "left hand", 271: "maker"}, compression="tiff_lzw", dpi=(150, 150))
    info = PngInfo()
    info.add_text("view", "PA")
    im.save(tmp_path/"a.png", pnginfo=info, dpi=(100, 100), exif=exif)
    for name in ("a.jpg", "a.tif", "a.png"):
        assert main(["corrupt", str(tmp_path/name), str(tmp_path/"out"/name), "-q", "4", "--quiet"]) == 0
    jpg, tif, png = (Image.open(tmp_path/"out"/name) for name in ("a.jpg", "a.tif", "a.png"))
    assert (jpg.getexif()[274], jpg.getexif()[271], jpg.size, jpg.info["dpi"]) == (6, "maker", im.size, (200, 100))
    assert (tif.tag_v2[270], tif.tag_v2[271], tif.info["compression"]) == ("left hand", "maker", "tiff_lzw")
    assert png.text["view"] == "PA" and png.getexif()[274] == 6 and round(png.info["dpi"][0]) == 100
    assert main(["corrupt", str(tmp_path/"a.jpg"), str(tmp_path/"out"/"b.png"), "-q", "4", "--quiet"]) == 0
    assert Image.open(tmp_path/"out"/"b.png").getexif()[274] == 6


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
def test_grey_in_any_mode_gets_the_same_noise(tmp_path, mode):
    grey = chest(3, 128)
    Image.fromarray(grey).convert(mode).save(tmp_path/"a.png")
    assert main(["corrupt", str(tmp_path/"a.png"), str(tmp_path/"out.png"), "-q", "4", "-e", "1", "--quiet"]) == 0
    im = Image.open(tmp_path/"out.png")
    assert im.mode == ("L" if mode == "P" else mode)
    assert (np.asarray(im.convert("RGB"))[..., 1] == corrupt(grey[None], Severity(4, 1), ["a.png"])[0]).all()


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_16_bit_colour_is_refused(tmp_path, name):
    "Pillow would cut it to 8 bit without a word; the files are written by hand."
    import struct, zlib
    if name == "x.png":
        word  = lambda n: struct.pack(">I", n)
        chunk = lambda kind, data: word(len(data)) + kind + data + word(zlib.crc32(kind + data))
        rows = b"".join(b"\0" + bytes(6*8) for _ in range(8))
        (tmp_path/name).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
                                    + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    else:
        data, bits = bytes(6*64), struct.pack("<HHH", 16, 16, 16)
        tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 3, 8 + len(data)), (259, 3, 1, 1), (262, 3, 1, 2),
                (273, 4, 1, 8), (277, 3, 1, 3), (278, 3, 1, 8), (279, 4, 1, len(data)), (284, 3, 1, 1)]
        ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
        (tmp_path/name).write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data) + len(bits)) + data + bits + ifd)
    with pytest.raises(ValueError, match="several channels of 16 bit"): read_radiograph(tmp_path/name)


# ---- depth: moments against the closed form

@pytest.mark.parametrize("name,bits,dtype", [("a.png", None, np.uint16), ("a.tif", None, np.uint16),
                                             ("b.png", 12, np.uint16), ("a.dcm", 12, np.uint16),
                                             ("b.dcm", 16, np.int16)])
def test_moments_at_depth(tmp_path, name, bits, dtype):
    """n = 262 144 pixels of one intensity, 2 moments, 3 severities, 5 kinds of file; each may be off by 4.5 standard
    errors: false alarms once in 150 000 comparisons, once in 5 000 runs of this test over all kinds."""
    full = 2**(bits or 16) - 1
    low  = -2**(bits - 1) if dtype == np.int16 else 0
    value = low + round(.4*full)
    pixels, intensity = np.full((512, 512), value, dtype), (value - low)/full
    options = []
    if name.endswith(".dcm"): dicom(pixels, bits).save_as(tmp_path/name, enforce_file_format=True)
    else: Image.fromarray(pixels).save(tmp_path/name); options = ["--bits", str(bits)] if bits else []
    for s in (Severity(2, 0), Severity(0, .4), Severity(3, .3)):
        run = cli("corrupt", tmp_path/name, tmp_path/"out"/name, "-q", s.s_q, "-e", s.s_e, "--force", *options)
        assert run.returncode == 0, run
        x = (read_radiograph(tmp_path/"out"/name, bits).pixels.astype(float) - low)/full
        variance = intensity*s.s_q**2/N0 + (SIGMA0*s.s_e)**2 + 1/12/full**2
        assert abs(x.mean() - intensity) < 4.5*math.sqrt(variance/x.size)
        assert abs(x.var() - variance) < 4.5*variance*math.sqrt(2.03/x.size)       # λ ≥ 44: excess kurtosis < 0.03


# ---- DICOM

def dicom(pixels, bits, photometric="MONOCHROME2", syntax=ExplicitVRLittleEndian, **more):
    "A small digital radiograph with nested, private and odd elements in its header."
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.Modality = "Test^Phantom", "p1", "", "DX"
    ds.ImageType, ds.ViewPosition, ds.ImagerPixelSpacing = ["ORIGINAL", "PRIMARY", "CHEST"], "PA", ["0.143", "0.143"]
    ds.LossyImageCompression, ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = "00", "1.5", "-7", "US"
    ds.WindowCenter, ds.WindowWidth, ds.PresentationLUTShape = ["2048", "1000"], ["4096", "500"], "IDENTITY"
    view = Dataset()
    view.CodeValue, view.CodingSchemeDesignator, view.CodeMeaning = "R-10206", "SNM3", "postero-anterior"
    ds.ViewCodeSequence = [view]
    block = ds.private_block(0x0019, "A MAKER", create=True)
    block.add_new(0x01, "LO", "dose index"); block.add_new(0x02, "DS", "412.5")
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *pixels.shape, 1, photometric
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8*pixels.itemsize, bits, bits - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    for keyword, value in more.items(): setattr(ds, keyword, value)
    data = pixels.astype(pixels.dtype.newbyteorder("<" if syntax.is_little_endian else ">")).tobytes()
    ds.PixelData = data + b"\0"*(len(data) % 2)
    ds["PixelData"].VR = "OW" if pixels.itemsize == 2 else "OB"
    return ds


def jpeg_inside(pixels, syntax, **more):
    "A radiograph with its pixels as JPEG or JPEG 2000 stream."
    stream = BytesIO()
    if syntax == JPEG2000Lossless: Image.fromarray(pixels).save(stream, "JPEG2000", irreversible=False, no_jp2=True)
    else: Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    ds = dicom(pixels, 8*pixels.itemsize, **more)
    ds.file_meta.TransferSyntaxUID, ds.PixelData = syntax, encapsulate([stream.getvalue()])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return ds


RAMP  = np.arange(96*64, dtype=np.uint16).reshape(96, 64) % 4096
KINDS = {
    "explicit":     lambda: dicom(RAMP, 12),
    "implicit":     lambda: dicom(RAMP, 12, syntax=ImplicitVRLittleEndian),
    "deflated":     lambda: dicom(RAMP, 12, syntax=DeflatedExplicitVRLittleEndian),
    "big endian":   lambda: dicom(RAMP, 12, syntax=ExplicitVRBigEndian),
    "inverted":     lambda: dicom(4095 - RAMP, 12, "MONOCHROME1", PresentationLUTShape="INVERSE"),
    "signed":       lambda: dicom(RAMP.astype(np.int16) - 2048, 12),
    "10 of 16":     lambda: dicom(RAMP >> 2, 10),
    "16 of 16":     lambda: dicom(RAMP*16, 16),
    "8 bit":        lambda: dicom((RAMP >> 4).astype(np.uint8), 8),
    "8 bit odd":    lambda: dicom((RAMP >> 4).astype(np.uint8)[:95, :63], 8, "MONOCHROME1"),
    "extremes":     lambda: dicom(RAMP[:, :60], 12, SmallestImagePixelValue=0, LargestImagePixelValue=4095),
    "derived":      lambda: dicom(RAMP, 12, ImageType=["DERIVED", "SECONDARY"], DerivationDescription="edges enhanced"),
    "JPEG":         lambda: jpeg_inside(chest(0, 128), JPEGBaseline8Bit, LossyImageCompression="01"),
    "JPEG 2000":    lambda: jpeg_inside(RAMP*16, JPEG2000Lossless),
}


def rle():
    ds = dicom(RAMP, 12)
    ds.compress(RLELossless, generate_instance_uid=False)
    return ds


@pytest.mark.parametrize("kind", [*KINDS, "RLE"])
def test_dicom_round_trip(tmp_path, kind):
    ds = rle() if kind == "RLE" else KINDS[kind]()
    ds.save_as(tmp_path/"a", enforce_file_format=True)
    for k in (1, 2): assert cli("corrupt", tmp_path/"a", tmp_path/f"out{k}", "-q", 4, "-e", 1).returncode == 0
    assert (tmp_path/"out1").read_bytes() == (tmp_path/"out2").read_bytes()        # UIDs are no exception
    old, new = pydicom.dcmread(tmp_path/"a"), pydicom.dcmread(tmp_path/"out1")
    allowed = {"ImageType", "SOPInstanceUID", "DerivationDescription", "SourceImageSequence", "PixelData"}
    if kind == "extremes": allowed |= {"SmallestImagePixelValue", "LargestImagePixelValue"}
    for tag in set(old.keys()) | set(new.keys()):
        keyword = pydicom.datadict.keyword_for_tag(tag)
        if keyword in allowed: continue
        assert tag in old and tag in new and old[tag] == new[tag] and old[tag].VR == new[tag].VR, (tag, keyword)
    assert list(new.ImageType)[0] == "DERIVED" and list(new.ImageType)[1:] == list(old.ImageType)[1:]
    assert new.SOPInstanceUID != old.SOPInstanceUID and new.SOPInstanceUID.is_valid
    assert new.file_meta.MediaStorageSOPInstanceUID == new.SOPInstanceUID
    assert new.SourceImageSequence[-1].ReferencedSOPInstanceUID == old.SOPInstanceUID
    assert new.DerivationDescription.startswith("edges enhanced; cxr-noise" if kind == "derived" else "cxr-noise")
    syntax = old.file_meta.TransferSyntaxUID
    assert new.file_meta.TransferSyntaxUID == (ExplicitVRLittleEndian if syntax.is_compressed else syntax)
    assert read_record(tmp_path/"out1")["s_e"] == 1
    clean, noisy = read_radiograph(tmp_path/"a"), read_radiograph(tmp_path/"out1")
    assert (noisy.pixels == noisy_pixels(clean, Severity(4, 1), "a")).all()
    assert (noisy.pixels != clean.pixels).mean() > .5
    if kind == "extremes":
        ends = new.SmallestImagePixelValue, new.LargestImagePixelValue
        assert ends == (noisy.pixels.min(), noisy.pixels.max()) != (0, 0)


def test_inverted_dicom_shows_the_same_picture(tmp_path):
    dicom(RAMP, 12).save_as(tmp_path/"two.dcm", enforce_file_format=True)
    KINDS["inverted"]().save_as(tmp_path/"one.dcm", enforce_file_format=True)
    for name in ("two.dcm", "one.dcm"):
        assert cli("corrupt", tmp_path/name, tmp_path/"out"/name, "-q", 6, "--image-id", "x").returncode == 0
    two, one = (read_radiograph(tmp_path/"out"/name) for name in ("two.dcm", "one.dcm"))
    assert (one.pixels == 4095 - two.pixels).all()


def test_padding_gets_no_noise(tmp_path):
    pixels = RAMP.copy() + 0
    pixels[:, :10] = 4000
    dicom(pixels, 12, PixelPaddingValue=4000).save_as(tmp_path/"a.dcm", enforce_file_format=True)
    assert main(["corrupt", str(tmp_path/"a.dcm"), str(tmp_path/"b.dcm"), "-e", "4", "--quiet"]) == 0
    noisy = read_radiograph(tmp_path/"b.dcm")
    assert (noisy.pixels[:, :10] == 4000).all() and (noisy.pixels[:, 10:] != pixels[:, 10:]).mean() > .9


# ---- the command itself

def test_starts_without_heavy_imports():
    heavy = {"torch", "numba", "scipy", "PIL", "pydicom", "matplotlib"}
    code = f"import sys, cxr_noise_study.cli; print({heavy} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_works_without_torch(tmp_path):
    Image.fromarray(chest(0)).save(tmp_path/"a.png")
    code = f"import sys; sys.modules['torch'] = None\nfrom cxr_noise_study.cli import main\n" \
           f"sys.exit(main(['corrupt', {str(tmp_path/'a.png')!r}, {str(tmp_path/'b.png')!r}, '-q', '4']))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0 and (tmp_path/"b.png").exists()


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(many, tmp_path):
    (tmp_path/"out").mkdir(mode=0o555)
    assert cli("corrupt", many/"in", tmp_path/"out", "-q", 4).returncode == 2


def test_ladder_and_info_of_a_dicom_file(tmp_path, capsys):
    KINDS["inverted"]().save_as(tmp_path/"a.dcm", enforce_file_format=True)
    assert main(["ladder", str(tmp_path/"a.dcm"), "-o", str(tmp_path/"a.png"), "--size", "64"]) == 0
    assert np.asarray(Image.open(tmp_path/"a.png")).std() > 20
    assert main(["ladder", str(tmp_path/"a.dcm"), "-o", str(tmp_path/"a.png")]) == 2             # exists
    capsys.readouterr()
    assert main(["info", "4", "2", "--image", str(tmp_path/"a.dcm")]) == 0
    kept, entropy = map(float, re.search(r"([\d.]+) bits per pixel .* has ([\d.]+)", capsys.readouterr().out).groups())
    assert 0 < kept < entropy <= 8


def test_number_of_workers(tmp_path, monkeypatch):
    "One process a core, and no more than one for 4 files."
    from cxr_noise_study import cli
    asked = []
    monkeypatch.setattr(cli, "cores", lambda: 3)
    monkeypatch.setattr(cli, "run_jobs", lambda jobs, recipe, workers: (asked.append(workers), (yield from ()))[0])
    for n in (1, 7, 9, 40):
        (tmp_path/str(n)).mkdir()
        for k in range(n): Image.fromarray(chest(0, 32)).save(tmp_path/str(n)/f"{k}.png")
        convert_files(str(tmp_path/str(n)), str(tmp_path/"out"), Recipe(Severity(4, 2)))
    assert asked == [1, 1, 2, 3]


@pytest.fixture
def sources():
    "The sources of the package, and these again afterwards."
    before = dict(SOURCES)
    yield
    for name in {*SOURCES} - {*before}: del SOURCES[name]


def test_any_registered_source(sources, tmp_path):
    "A source from a file, in this process and in two; --resume compares its severity and its code."
    extension = tmp_path/"dead.py"
    code = """
from cxr_noise_study.noise import SOURCES, Source
def sample(intensity, severity, rng): return intensity*(rng.random(intensity.shape) >= severity/100)
SOURCES.register(Source("dead_rows", stage=50, unit="share of pixels set to 0, in %", sample=sample))
"""
    extension.write_text(code)
    (tmp_path/"in").mkdir()
    for k in range(9): Image.fromarray(chest(k, 64) | 1).save(tmp_path/"in"/f"{k}.png")
    words = ["corrupt", tmp_path/"in", tmp_path/"out", "--severity", "dead_rows=20,electronic=0.1", "--extend", extension]
    assert cli(*words, "--workers", 1).returncode == 0
    one = tree(tmp_path/"out")
    assert cli(*words, "--workers", 2, "--force").returncode == 0 and tree(tmp_path/"out") == one
    assert .15 < np.mean([np.asarray(Image.open(p)) == 0 for p in (tmp_path/"out").iterdir()]) < .25
    assert "9 kept" in cli(*words, "--resume").stdout
    other = cli(*words[:4], "dead_rows=21,electronic=0.1", *words[5:], "--resume")
    assert other.returncode == 2 and "severity electronic=0.1,dead_rows=20 in place of" in other.stderr
    extension.write_text(code + "# changed\n")
    assert "extend " in (again := cli(*words, "--resume")).stderr and again.returncode == 2


def test_records_of_before_are_read(tmp_path):
    "The record that 0.1 wrote: --resume goes on with such files."
    Image.fromarray(chest(0, 64)).save(tmp_path/"a.png")
    assert cli("corrupt", tmp_path/"a.png", tmp_path/"b.png", "-q", 4, "-e", 2).returncode == 0
    from cxr_noise_study import __version__
    assert read_record(tmp_path/"b.png") == dict(s_q=4., s_e=2., seed=0, replicate=0, image_id="a.png", normalise=False,
                                                 bits=None, version=__version__)


@pytest.mark.skipif("CXR_REAL_DATA" not in os.environ, reason="CXR_REAL_DATA does not name a folder with radiographs")
def test_real_radiographs(tmp_path):
    found = sorted(Path(os.environ["CXR_REAL_DATA"]).rglob("*.png"))[::50][:12]
    if not found: pytest.skip("no PNG file below CXR_REAL_DATA")
    (tmp_path/"in").mkdir()
    for k, path in enumerate(found): (tmp_path/"in"/f"{k}.png").symlink_to(path)
    outcome = convert_files(str(tmp_path/"in"), str(tmp_path/"out"), Recipe(Severity(4, 2)))
    assert len(outcome.written) == len(found) and not outcome.failed
    for k, path in enumerate(found):
        clean = read_radiograph(path)
        noisy = read_radiograph(tmp_path/"out"/f"{k}.png")
        assert (noisy.pixels == noisy_pixels(clean, Severity(4, 2), f"{k}.png")).all()


# ---- hostile input

def test_14_11_workers_are_capped(tmp_path, monkeypatch):
    "At most one a file and two a core, whatever is asked for."
    from cxr_noise_study import cli as module
    asked = []
    monkeypatch.setattr(module, "cores", lambda: 2)
    monkeypatch.setattr(module, "run_jobs", lambda jobs, recipe, workers: (asked.append(workers), (yield from ()))[0])
    (tmp_path/"in").mkdir()
    for n, workers in ((1, 100_000), (3, 100_000), (9, 100_000), (9, 3)):
        for k in range(n): Image.fromarray(chest(0, 32)).save(tmp_path/"in"/f"{k}.png")
        convert_files(str(tmp_path/"in"), str(tmp_path/"out"), Recipe(Severity(4, 2)), workers)
    assert asked == [1, 3, 4, 3]


def named_film(**more):
    "A radiograph with a patient's name, dates and numbers, nested and private ones too."
    nested = Dataset()
    nested.PatientID, nested.ReferencedSOPInstanceUID = "12345", "1.2.3"
    ds = dicom(RAMP, 12, PatientName="Doe^Jane", PatientID="12345", PatientBirthDate="19700102", AccessionNumber="A77",
               StudyDate="20200203", InstitutionName="Saint Nowhere", ReferringPhysicianName="Who^Doctor",
               PatientComments="Jane Doe", OtherPatientIDsSequence=[nested], **more)
    block = ds.private_block(0x0029, "A MAKER", create=True)
    block.add_new(0x01, "LO", "Jane Doe")
    view = Dataset()
    view.PatientName, view.CodeMeaning = "Doe^Jane", "postero-anterior"
    ds.ViewCodeSequence = [view]
    return ds


def test_14_14_the_patient_can_be_left_out(tmp_path):
    pytest.importorskip("dicomanonymizer")
    (tmp_path/"in").mkdir()
    study = generate_uid()
    for k in "ab": named_film(StudyInstanceUID=study).save_as(tmp_path/"in"/f"{k}.dcm", enforce_file_format=True)
    info = PngInfo()
    info.add_text("Title", "Jane Doe")
    exif = Image.Exif()
    exif[274], exif[315] = 6, "Jane Doe"
    Image.fromarray(chest(0, 64)).save(tmp_path/"in"/"c.png", pnginfo=info, exif=exif)
    Image.fromarray(chest(0, 64)).save(tmp_path/"in"/"d.tif", tiffinfo={270: "Jane Doe", 315: "Jane Doe"})
    words = ["corrupt", tmp_path/"in", tmp_path/"out", "-q", 4]
    kept = cli(*words)
    assert kept.returncode == 0 and "--deidentify" in kept.stderr and b"Doe^Jane" in (tmp_path/"out"/"a.dcm").read_bytes()
    run = cli(*words, "--deidentify", "--force")
    assert run.returncode == 0 and "--deidentify" not in run.stderr, run.stderr
    for name, content in tree(tmp_path/"out").items():
        for word in (b"Jane", b"12345", b"19700102", b"A77", b"20200203", b"Nowhere", b"Doctor", study.encode()):
            assert word not in content, (name, word)
    a, b = (pydicom.dcmread(tmp_path/"out"/f"{k}.dcm") for k in "ab")
    assert a.StudyInstanceUID == b.StudyInstanceUID != study and a.SOPInstanceUID != b.SOPInstanceUID
    assert a.PatientIdentityRemoved == "YES" and "Basic" in a.DeidentificationMethod
    assert (read_radiograph(tmp_path/"out"/"a.dcm").pixels == noisy_pixels(
        read_radiograph(tmp_path/"in"/"a.dcm"), Severity(4), "a.dcm")).all()
    assert Image.open(tmp_path/"out"/"c.png").getexif()[274] == 6                        # how it is to be turned
    (tmp_path/"key").write_bytes(b"sixteen bytes ok")
    keyed = [*words, "--deidentify", "--key", tmp_path/"key"]
    assert cli(*keyed, "--force").returncode == 0 and (before := tree(tmp_path/"out"))
    assert cli(*keyed, "--force").returncode == 0 and tree(tmp_path/"out") == before
    assert "4 kept" in cli(*keyed, "--resume").stdout
    (tmp_path/"key").write_bytes(b"sixteen others ok")
    for other in (words, keyed): assert cli(*other, "--resume").returncode == 2           # not the same files
    assert "--key FILE" in cli(*words, "--deidentify", "--resume").stderr
    assert tree(tmp_path/"out") == before


def test_14_14_two_patients_stay_two(tmp_path):
    "Two images of one patient and one of another: equal and different numbers, in one call and with one key."
    pytest.importorskip("dicomanonymizer")
    (tmp_path/"in").mkdir()
    for name, number in dict(a="12345", b="12345", c="12346", d="").items():
        film = named_film()
        film.PatientID = number
        film.save_as(tmp_path/"in"/f"{name}.dcm", enforce_file_format=True)
    def numbers(*more):
        assert cli("corrupt", tmp_path/"in", tmp_path/"out", "-q", 4, "--deidentify", "--force", *more).returncode == 0
        return {k: pydicom.dcmread(tmp_path/"out"/f"{k}.dcm").PatientID for k in "abcd"}
    (tmp_path/"one").write_bytes(b"sixteen bytes ok")
    (tmp_path/"two").write_bytes(b"sixteen bytes no")
    once, again = numbers(), numbers()
    keyed, other = numbers("--key", tmp_path/"one"), numbers("--key", tmp_path/"two")
    for found in (once, again, keyed, other):
        assert found["a"] == found["b"] != found["c"] and found["d"] == "" and "1234" not in str(found)
    assert len({found["a"] for found in (once, again, keyed, other)}) == 4
    assert numbers("--key", tmp_path/"one", "--workers", 2) == keyed
    run = cli("corrupt", tmp_path/"in", tmp_path/"new", "-q", 4, "--key", tmp_path/"one")
    assert run.returncode == 2 and "--key needs --deidentify" in run.stderr and not (tmp_path/"new").exists()
    (tmp_path/"one").write_bytes(b"short")
    assert "at least 16" in cli("corrupt", tmp_path/"in", tmp_path/"new", "-q", 4, "--deidentify", "--key", tmp_path/"one").stderr


def test_14_14_overlays_references_and_letters(tmp_path):
    "Overlays go with what describes them; references fit the new UIDs; the header and the console say what was not done."
    pytest.importorskip("dicomanonymizer")
    (tmp_path/"in").mkdir()
    first, second = named_film(), named_film(BurnedInAnnotation="YES")
    first.add_new((0x6000, 0x0010), "US", 8), first.add_new((0x6002, 0x0022), "LO", "Jane Doe")      # rows; description
    source = Dataset()
    source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = first.SOPClassUID, first.SOPInstanceUID
    second.SourceImageSequence, second.ReferencedImageSequence = [source], [source]
    for name, film in dict(a=first, b=second).items(): film.save_as(tmp_path/"in"/f"{name}.dcm", enforce_file_format=True)
    run = cli("corrupt", tmp_path/"in", tmp_path/"out", "-q", 4, "--deidentify", "--quiet")
    assert run.returncode == 0 and "b.dcm: BurnedInAnnotation is YES" in run.stderr and "a.dcm" not in run.stderr
    a, b = (pydicom.dcmread(tmp_path/"out"/f"{k}.dcm") for k in "ab")
    assert not [e for e in a if e.tag.group & 0xFF00 == 0x6000] and b"Jane" not in (tmp_path/"out"/"a.dcm").read_bytes()
    renamed = a.SourceImageSequence[-1].ReferencedSOPInstanceUID              # of the image that the noise was added to
    assert renamed != first.SOPInstanceUID and pydicom.uid.UID(renamed).is_valid
    for item in (b.SourceImageSequence[0], b.ReferencedImageSequence[0]):
        assert (item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID) == (first.SOPClassUID, renamed)
    assert {a.LongitudinalTemporalInformationModified, b.LongitudinalTemporalInformationModified} == {"REMOVED"}


# ---- denoising

def test_15_5_files_are_denoised(tmp_path):
    "Pictures of any depth and DICOM, with the same machinery: names, record, --resume, bad files."
    from cxr_noise_study.denoising import denoise
    (tmp_path/"in").mkdir()
    clean = chest(0, 64)
    noisy = corrupt(clean, Severity(0, 2), "a")
    Image.fromarray(noisy).save(tmp_path/"in"/"a.png")
    Image.fromarray(noisy*np.uint16(257)).save(tmp_path/"in"/"b.tif")
    dicom(4095 - (noisy.astype(np.uint16) << 4), 12, "MONOCHROME1").save_as(tmp_path/"in"/"c.dcm", enforce_file_format=True)
    (tmp_path/"in"/"d.png").write_text("not a picture")
    words = ["denoise", tmp_path/"in", tmp_path/"out", "--severity", "0,2", "--method", "median"]
    run = cli(*words)
    assert run.returncode == 1 and "3 written" in run.stdout and "d.png: is not a PNG" in run.stderr, run
    expected = denoise(noisy, Severity(0, 2), "median")
    assert abs(expected - clean.astype(float)).mean() < .5*abs(noisy - clean.astype(float)).mean()
    assert (np.asarray(Image.open(tmp_path/"out"/"a.png")) == expected).all()
    assert (np.asarray(Image.open(tmp_path/"out"/"b.tif")) == expected*np.uint16(257)).all()
    seen = np.rint(noisy*(16/4095*255)).astype(np.uint8)                                 # of the 12 bits
    shown = read_radiograph(tmp_path/"out"/"c.dcm").intensity
    assert abs(shown - denoise(seen, Severity(0, 2), "median")/255).max() < .5/4095 + 1e-9
    header = pydicom.dcmread(tmp_path/"out"/"c.dcm")
    assert header.ImageType[0] == "DERIVED" and '"method": "median"' in header.DerivationDescription
    assert header.SourceImageSequence[-1].ReferencedSOPInstanceUID == pydicom.dcmread(tmp_path/"in"/"c.dcm").SOPInstanceUID
    record = read_record(tmp_path/"out"/"a.png")
    assert (record["s_e"], record["method"]) == (2, "median") and "seed" not in record
    (tmp_path/"in"/"d.png").unlink()
    assert "3 kept" in cli(*words, "--resume").stdout
    for other in (["--severity", "0,1", "--method", "median"], ["--severity", "0,2", "--method", "gaussian"]):
        assert "in place of" in cli(*words[:3], *other, "--resume").stderr


def test_15_5_files_are_denoised_by_a_finished_run(tmp_path):
    "Whatever the weights: the same pixels as in evaluation, at the size of the training; another run's files are not kept."
    pytest.importorskip("torch")
    from cxr_noise_study.evaluation import load_denoiser
    from cxr_noise_study.networks import build_model, save_checkpoint
    for name in ("one", "two"):
        about = dict(arch="skidnet", encoder="skidnet", outputs=["image"], task="restore", size=64, normalise="min-max")
        (tmp_path/name).mkdir()
        save_checkpoint(build_model("skidnet").eval(), tmp_path/name/"checkpoint.safetensors", **about)
    (tmp_path/"in").mkdir()
    noisy = corrupt(chest(0, 64), Severity(4), "a")
    for name, image in dict(a=noisy, b=noisy.repeat(2, 0)).items(): Image.fromarray(image).save(tmp_path/"in"/f"{name}.png")
    words = ["denoise", tmp_path/"in", tmp_path/"out", "-q", 4, "--method"]
    run = cli(*words, tmp_path/"one")
    assert run.returncode == 1 and "trained with size 64, but the images have size 128" in run.stderr, run
    found = np.asarray(Image.open(tmp_path/"out"/"a.png"))
    assert (found == load_denoiser(tmp_path/"one")(noisy, Severity(4))).all() and (found != noisy).any()
    record = read_record(tmp_path/"out"/"a.png")
    assert record["method"] == "one" and str(tmp_path) not in str(record)
    (tmp_path/"in"/"b.png").unlink()
    assert "1 kept" in cli(*words, tmp_path/"one"/"checkpoint.safetensors", "--resume").stdout
    assert "in place of" in cli(*words, tmp_path/"two", "--resume").stderr


@pytest.mark.parametrize("severity,method,reason", [
    ("4,2", "medain", "median"), ("4,2", "none/run", "none/run"), ("0,2", "poisson_bm3d", "quantum noise alone"),
    ("4,x", "median", "must be finite"), ("4,2", "", "method")])
def test_15_5_what_cannot_denoise_is_refused(tmp_path, severity, method, reason):
    Image.fromarray(chest(0, 32)).save(tmp_path/"a.png")
    run = cli("denoise", tmp_path/"a.png", tmp_path/"out"/"a.png", "--severity", severity, "--method", method)
    assert run.returncode == 2 and reason in run.stderr and len(run.stderr.splitlines()) == 1, run
    assert not (tmp_path/"out").exists()


def test_14_14_without_the_list_of_the_standard_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dicomanonymizer", None)
    named_film().save_as(tmp_path/"a.dcm", enforce_file_format=True)
    run = cli("corrupt", tmp_path/"a.dcm", tmp_path/"b.dcm", "-q", 4, "--deidentify")
    assert run.returncode == 1 and "pip install 'cxr_noise_study[dicom]'" in run.stderr and not (tmp_path/"b.dcm").exists()


def shell(line, tmp_path, **environment):
    "Run a line of bash in a folder with one good and five bad pictures, and return its exit codes and output."
    (tmp_path/"in").mkdir(exist_ok=True)
    Image.fromarray(chest(0, 32)).save(tmp_path/"in"/"z.png")
    for k in range(5): (tmp_path/"in"/f"{k}.png").write_text("not a picture")
    line = line.replace("cxr-noise", " ".join(CLI))
    return subprocess.run(["bash", "-c", f"{line}; echo ${{PIPESTATUS[0]}} >code"], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | environment, timeout=120)


@posix
@pytest.mark.parametrize("line,code,written", [
    ("cxr-noise corrupt in out -q 4 --workers 1 2>&-", 1, True), ("cxr-noise corrupt in out -q 4 --workers 2 2>&- >&-", 1, True),
    ("cxr-noise info nonsense 2>&-", 2, False), ("cxr-noise info 4 2 >&-", 0, False), ("cxr-noise --help >&-", 0, False)])
def test_14_18_closed_streams(tmp_path, line, code, written):
    run = shell(line, tmp_path)
    assert (tmp_path/"code").read_text().strip() == str(code) and "Traceback" not in run.stderr, run
    if written:
        noisy = np.asarray(Image.open(tmp_path/"out"/"z.png"))
        assert (noisy == corrupt(chest(0, 32), Severity(4), "z.png")).all()


@posix
@pytest.mark.parametrize("line,code,first", [
    ("cxr-noise corrupt in out -q 4 --workers 1 2>&1 | head -1", 1, "in/0.png: is not a PNG"),
    ("cxr-noise info 4 2 | head -1", 0, "quantum 4"), ("cxr-noise info 4 2 | true", 0, ""),
    ("cxr-noise --help | true", 0, ""), ("cxr-noise info nonsense 2>&1 | true", 2, "")])
def test_14_18_a_reader_that_has_seen_enough(tmp_path, line, code, first):
    "The work goes on, the exit code is that of the work, and nothing is said of the pipe."
    run = shell(line, tmp_path)
    assert (tmp_path/"code").read_text().strip() == str(code) and not run.stderr, run
    assert len(run.stdout.splitlines()) == bool(first) and run.stdout.startswith(first)
    if "corrupt" in line: assert (tmp_path/"out"/"z.png").exists()


@posix
def test_14_18_an_ascii_terminal(tmp_path):
    "Letters that it lacks are spelt out, and a file keeps the noise that its name has elsewhere."
    ascii = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="")
    run = shell("cxr-noise info 0 2; cxr-noise --help; cxr-noise info -- -1", tmp_path, **ascii)
    assert "sigma = 0.2 of full scale" in run.stdout and "must be finite and >= 0" in run.stderr and "Trace" not in run.stderr
    (tmp_path/"ä").mkdir()
    Image.fromarray(chest(0, 32)).save(tmp_path/"ä"/"ü.png")
    for out, environment in (("one", {}), ("two", ascii)):
        assert "written" in shell(f"cxr-noise corrupt ä {out} -q 4", tmp_path, **environment).stdout
        assert "written" in shell(f"cxr-noise corrupt ä/ü.png {out}.png -q 4 --image-id ü", tmp_path, **environment).stdout
    assert (tmp_path/"one"/"ü.png").read_bytes() == (tmp_path/"two"/"ü.png").read_bytes()
    assert (tmp_path/"one.png").read_bytes() == (tmp_path/"two.png").read_bytes()


@pytest.mark.filterwarnings("error")
def test_14_18_severities_far_below_any_use(capsys):
    for words in (["1e-200", "1e-200"], ["1e-200"], ["0", "1e-310"], ["1e-3"]):
        assert main(["info", *words]) == 0
        printed = capsys.readouterr()
        assert "8.000 bits per pixel" in printed.out and not printed.err, printed
        assert not re.search(r"\b(inf|nan)\b", printed.out, re.I)


def test_14_18_empty_names_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(chest(0, 32)).save("a.png")
    for words in (["corrupt", "a.png", ""], ["corrupt", "a.png", " "], ["corrupt", "", "out"], ["ladder", "a.png", "-o", ""],
                  ["evaluate", "a.png", "in", "-o", ""], ["corrupt", "a.png", "b.png", "--severity", ""]):
        run = cli(*words, *(["-q", 4] if words[0] == "corrupt" and "--severity" not in words else []))
        assert run.returncode == 2 and len(run.stderr.splitlines()) == 1, run
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_14_4_one_command_tests_an_onnx_model(tmp_path):
    "Records, table and page; a second time from what is there; a wrong folder in one line."
    pytest.importorskip("onnxruntime")
    torch = pytest.importorskip("torch")
    class Darker(torch.nn.Module):
        def forward(self, x): return .45 - x
    torch.onnx.export(Darker(), (torch.zeros(1, 1, 64, 64),), str(tmp_path/"model.onnx"), dynamo=False, input_names=["x"],
                      output_names=["y"], dynamic_axes={"x": {0: "n"}, "y": {0: "n"}})
    from cxr_noise_study.phantom import phantom
    made, rows = phantom(4, 64), ["image,patient_id,lungs"]
    for i in range(4):
        Image.fromarray(made.images[i]).save(tmp_path/f"{i}.png")
        Image.fromarray(made.lungs[i]*255).save(tmp_path/f"lungs-{i}.png")
        rows.append(f"{i}.png,p{i},lungs-{i}.png")
    (tmp_path/"manifest.csv").write_text("\n".join(rows))
    words = ["evaluate", tmp_path/"model.onnx", tmp_path, "-o", tmp_path/"report", "--conditions", "0,0 4,0", "--quiet"]
    for _ in range(2):
        run = cli(*words)
        assert run.returncode == 0 and run.stdout.strip() == str(tmp_path/"report"/"report.html"), run
    assert {"report.html", "records.parquet", "summary.csv"} <= {p.name for p in (tmp_path/"report").iterdir()}
    run = cli(*words[:3], "-o", tmp_path/"denoised", *words[5:], "--denoiser", "median")          # issue 15, 5
    noisy, denoised = (pd.read_parquet(tmp_path/name/"records.parquet") for name in ("report", "denoised"))
    assert run.returncode == 0 and set(denoised.denoiser) == {"median"} and (noisy.dice != denoised.dice).any(), run
    run = cli(*words[:3], "-o", tmp_path/"wrong", *words[5:], "--denoiser", "medain")
    assert run.returncode == 2 and "median" in run.stderr and not (tmp_path/"wrong").exists(), run
    for folder in (tmp_path/"none", tmp_path/"0.png"):
        run = cli(*words[:2], folder, *words[3:])
        assert run.returncode == 2 and len(run.stderr.splitlines()) == 1 and "stopped" not in run.stderr, run
    run = cli(*words[:3], "-o", tmp_path/"0.png", *words[5:])
    assert run.returncode == 2 and "0.png is not a folder" in run.stderr, run
    for more, said in ((["--size", 9999999], "size must lie between 32 and 4096 pixels, got 9999999"),
                       (["--size", -5], "got -5"), (["--task", "nothing"], "task 'nothing' is neither one of")):
        run = cli(*words[:3], "-o", tmp_path/"odd", *words[5:], *more)
        assert run.returncode == 2 and said in run.stderr and len(run.stderr.splitlines()) == 1, run
    import onnx
    model = onnx.load(tmp_path/"model.onnx")
    model.ir_version = 99
    onnx.save(model, tmp_path/"later.onnx")
    run = cli("evaluate", tmp_path/"later.onnx", *words[2:])
    assert run.returncode == 2 and "::" not in run.stderr and "IR version" in run.stderr, run
    for i in range(2): (tmp_path/f"{i}.png").write_text("torn")
    run = cli(*words[:3], "-o", tmp_path/"torn", *words[5:])
    assert run.returncode == 2 and [line[:14] for line in run.stderr.splitlines()[1:3]] == ["  manifest.csv"]*2, run


def test_a_deidentified_record_does_not_name_the_path(tmp_path):
    (tmp_path/"in"/"DOE_JOHN").mkdir(parents=True)
    Image.fromarray(chest(0, 32)).save(tmp_path/"in"/"DOE_JOHN"/"1.png")
    for out, more in (("open", []), ("safe", ["--deidentify"])):
        assert cli("corrupt", tmp_path/"in", tmp_path/out, "-q", 4, "--workers", 1, *more).returncode == 0
    kept, safe = (tmp_path/out/"DOE_JOHN"/"1.png" for out in ("open", "safe"))
    assert b"DOE" in kept.read_bytes() and b"DOE" not in safe.read_bytes()
    assert (np.asarray(Image.open(kept)) == np.asarray(Image.open(safe))).all()


# ---- hostile files, folders and names

@posix
def test_14_11_odd_names_take_one_line_each(tmp_path):
    "A line feed, a terminal's escape, bytes that are no text, a leading dash, a link to itself, one to nothing."
    source = tmp_path/"in"
    source.mkdir()
    broken = (b"a\nb.png", b"\x1b[31mc.png", b"d\xff.png")
    for name in broken: Path(os.fsdecode(bytes(source) + b"/" + name)).write_text("not a picture")
    Image.fromarray(chest(0, 32)).save(source/"-q.png")
    (source/"loop.png").symlink_to("loop.png")
    (source/"nowhere.png").symlink_to("none.png")
    run = cli("corrupt", source, tmp_path/"out", "-q", 4, "--workers", 1)
    lines = [line for line in run.stderr.splitlines() if line.startswith(str(source))]
    assert run.returncode == 1 and len(lines) == 5 == len(run.stderr.splitlines()), run.stderr
    assert r"a\nb.png: is not a PNG" in run.stderr and r"\x1b[31mc.png: is" in run.stderr and r"d\udcff.png: is" in run.stderr
    assert "loop.png: Too many levels" in run.stderr and "nowhere.png: No such file" in run.stderr
    assert [*tree(tmp_path/"out")] == ["-q.png"] and "1 written" in run.stdout and "5 failed" in run.stdout
    run = cli("corrupt", tmp_path/"a\nb", tmp_path/"out", "-q", 4)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1


def test_14_11_large_headers_ask_for_no_memory(tmp_path):
    "Pillow's limit is an error of one line; below it there is no warning with a path of the installation."
    import struct, tracemalloc, zlib
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    for side in (12_000, 20_000, 2**31 - 1):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
        (tmp_path/"a.png").write_bytes(data)
        tracemalloc.start()
        run = cli("corrupt", tmp_path/"a.png", tmp_path/"b.png", "-q", 4)
        assert tracemalloc.get_traced_memory()[1] < 2**26
        tracemalloc.stop()
        assert run.returncode == 1 and ("is too large" if side > 12_000 else "is damaged") in run.stderr
        assert len(run.stderr.splitlines()) == 1 and "site-packages" not in run.stderr and not (tmp_path/"b.png").exists()


def test_14_14_odd_headers_take_one_line_and_no_warning(tmp_path):
    source = tmp_path/"in"
    source.mkdir()
    with pytest.warns(UserWarning):
        films = dict(uid=dicom(RAMP, 12, StudyInstanceUID="not.a.uid"), many=dicom(RAMP, 12, PatientID=["1", "2"]))
        for name, film in films.items(): film.save_as(source/f"{name}.dcm", enforce_file_format=True)
    Image.fromarray(chest(0, 32)).save(source/"picture.dcm", "PNG")
    words = ["corrupt", source, tmp_path/"out", "-q", 4, "--quiet"]
    for more in ((), ("--deidentify", "--force")):
        run = cli(*words, *more)
        assert run.returncode == 1 and set(tree(tmp_path/"out")) == {"uid.dcm", "many.dcm"}
        assert "picture.dcm: is a PNG picture" in run.stderr and len(run.stderr.splitlines()) == 1, run.stderr


def test_14_11_an_extension_that_exits_is_refused(tmp_path):
    "It would end the command with exit code 0 and nothing written."
    (tmp_path/"quits.py").write_text("raise SystemExit(0)")
    Image.fromarray(chest(0, 32)).save(tmp_path/"a.png")
    run = cli("corrupt", tmp_path/"a.png", tmp_path/"b.png", "-q", 4, "--extend", tmp_path/"quits.py")
    assert run.returncode == 2 and "quits.py: SystemExit" in run.stderr and not (tmp_path/"b.png").exists()
