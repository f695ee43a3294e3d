"Denoisers against other libraries, and on real radiographs where CXR_REAL_DATA names them."
import numpy as np
import pytest

from cxr_noise_study.channel import NoiseChannel, corrupt
from cxr_noise_study.datasets import nih_table
from cxr_noise_study.denoising import (DENOISERS, LEVELS, Denoiser, anscombe_scale, bm3d, denoise, denoising_records,
                                       denoising_summary, exact_scale, filtered, haarpsi, mean_scale, nonlocal_means)
from cxr_noise_study.images import read_grey, square, to_grey8
from cxr_noise_study.noise import SOURCES, Severity, Source
from cxr_noise_study.phantom import phantom


@pytest.fixture(scope="module", autouse=True)
def peers():
    "The generalised Anscombe transform around the same filters."
    for name, filter in ("anscombe_nlm", nonlocal_means), ("anscombe_bm3d", bm3d):
        DENOISERS.register(Denoiser(name, filtered(filter, anscombe_scale), "photons and readout noise"))
    yield
    for name in ("anscombe_nlm", "anscombe_bm3d"): del DENOISERS[name]


@pytest.mark.parametrize("constants", [(30, 4.2), (5, 4.9)])
@pytest.mark.parametrize("shape", [(96, 96), (64, 80)])
def test_haarpsi_is_that_of_piq(constants, shape):
    piq, torch = pytest.importorskip("piq"), pytest.importorskip("torch")
    clean = phantom(1, size=96, workers=1).images[0][:shape[0],:shape[1]]
    for severity in (Severity(1), Severity(4, 2)):
        noisy = corrupt(clean, severity, "a")
        theirs = piq.haarpsi(*(torch.from_numpy(i/255)[None,None] for i in (noisy, clean)), c=constants[0],
                             alpha=constants[1])
        assert abs(haarpsi(clean, noisy, *constants) - float(theirs)) < 1e-9


def test_a_source_from_outside_is_inverted_exactly():
    def law(x, bounds, s): return (1 - s)*(x[:,None] <= bounds) + s*(bounds >= 0)     # a share of pixels reads 0
    SOURCES.register(Source("test_dead", 60, "share of pixels set to 0", None, law))
    try:
        severity, ramp = Severity(10, test_dead=.2), np.arange(256, dtype=np.uint8)[None]
        pmf = NoiseChannel(severity).pmf
        for scale in (mean_scale, exact_scale):
            oracle = filtered(lambda image, sd: pmf@scale(severity).forward, scale)
            assert np.allclose(oracle(ramp, severity), LEVELS, atol=1e-9)
        with pytest.raises(ValueError, match="photon noise, and readout noise at most"): anscombe_scale(severity)
    finally: del SOURCES["test_dead"]


def test_what_is_no_batch_of_8_bit_images_is_refused():
    for wrong in (np.zeros((2, 8, 8)), np.zeros((1, 1, 8, 8), np.uint8), np.zeros(8, np.uint8)):
        with pytest.raises(ValueError, match="must be uint8"): denoise(wrong, Severity(4), "tv")
    image = np.zeros((8, 8), np.uint8)
    with pytest.raises(ValueError, match="Did you mean 'exact_bm3d'"): denoise(image, Severity(4), "exact_bm3")


def radiographs(folder, n, size=256):
    "Images of n patients, one each, and the patients: the first in order of number that are there."
    table = nih_table(folder/"nih").drop_duplicates("patient_id")
    found = table[[(folder/"nih"/"images"/name).exists() for name in table.image]].head(n)
    images = [to_grey8(square(read_grey(folder/"nih"/"images"/name), size)) for name in found.image]
    return np.stack(images), found.patient_id.astype(str).tolist()


def summary(records, reference):
    "The change from a reference, with its interval, by condition and denoiser."
    return denoising_summary(records, reference=reference).set_index(["condition", "denoiser"]).sort_index()


def test_the_exact_table_beats_anscombe_and_the_plain_filter_on_8_patients(real_data):
    images, patients = radiographs(real_data, 8)
    names = ["nlm", "anscombe_nlm", "exact_nlm"]
    records = denoising_records(images, patients, patients, [Severity(10), Severity(4, 2)], names)
    for reference in names[:2]:
        found = summary(records, reference)
        for condition in ("10,0", "4,2"): assert found.loc[(condition, "exact_nlm"), "change_low"] > 1


def test_bm3d_gains_two_decibels_where_noise_clips(real_data):
    images, patients = radiographs(real_data, 2)
    def gain(condition, reference):
        records = denoising_records(images, patients, patients, [condition], [reference, "exact_bm3d"])
        return summary(records, reference).xs("exact_bm3d", level=1).change.item()
    assert gain(Severity(0, 10), "bm3d") > 2
