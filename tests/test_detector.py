"Detector and dose where a notebook does not reach: files, odd shapes, workers, the entry point, whole radiographs."
import math, pickle, subprocess, sys
from importlib.metadata import entry_points

import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian

from cxr_noise_study.channel import corrupt, is_pixelwise, NoiseChannel
from cxr_noise_study.detector import CR, CSI, DETECTORS, Detector, detect, noise_power_spectrum, noise_shape
from cxr_noise_study.dose import (CHEST, LINEAR, air_kerma, detector_noise, dose_ladder, dose_line, photons_per_kerma,
                                  pixel_pitch, reduce_dose, reduce_dose_file)
from cxr_noise_study.images import read_radiograph
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
    code = ("import sys, numpy as np; from cxr_noise_study import dose; from cxr_noise_study.channel import corrupt; "
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
    assert "in the unattenuated beam" in dose_line(Severity(detector=4), (.2, "given"))
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
