"Denoisers against other libraries, and on real radiographs where CXR_REAL_DATA names them."
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from cxr_noise_study.channel import NoiseChannel, corrupt
from cxr_noise_study.datasets import Radiographs, nih_table
from cxr_noise_study.denoising import (DENOISERS, LEVELS, Denoiser, anscombe_scale, bm3d, denoise, exact_scale, filtered,
                                       mean_scale, nonlocal_means)
from cxr_noise_study.images import read_grey, square, to_grey8
from cxr_noise_study.noise import SOURCES, Severity, Source
from cxr_noise_study.phantom import phantom
from cxr_noise_study.restoration import denoiser_records, restoration_table
from cxr_noise_study.tasks import METRICS, TASKS, Truth


@pytest.fixture(scope="module", autouse=True)
def peers():
    "The generalised Anscombe transform around the same filters."
    for name, filter in ("anscombe_nlm", nonlocal_means), ("anscombe_bm3d", bm3d):
        DENOISERS.register(Denoiser(name, filtered(filter, anscombe_scale), "photons and readout noise"))
    yield
    for name in ("anscombe_nlm", "anscombe_bm3d"): del DENOISERS[name]


@pytest.mark.parametrize("name, c, alpha", [("haarpsi_natural", 30, 4.2), ("haarpsi", 5, 4.9)])
@pytest.mark.parametrize("shape", [(96, 96), (64, 80)])
def test_haarpsi_is_that_of_piq(name, c, alpha, shape):
    piq, torch = pytest.importorskip("piq"), pytest.importorskip("torch")
    clean = phantom(1, size=96, workers=1).images[0][:shape[0],:shape[1]]
    for severity in (Severity(1), Severity(4, 2)):
        noisy = corrupt(clean, severity, "a")
        theirs = piq.haarpsi(*(torch.from_numpy(i/255)[None,None] for i in (noisy, clean)), c=c, alpha=alpha)
        ours = METRICS[name].function(noisy[None,None]/255, Truth(clean[None,None]))
        assert abs(ours.item() - float(theirs)) < 1e-9


@pytest.mark.parametrize("name, c, alpha", [("haarpsi_natural", 30, 4.2), ("haarpsi", 5, 4.9)])
def test_15_2_haarpsi_is_that_of_deepinv(name, c, alpha):
    metric, torch = pytest.importorskip("deepinv.loss.metric"), pytest.importorskip("torch")
    clean = phantom(1, size=96, workers=1).images[0]
    noisy = corrupt(clean, Severity(4, 2), "a")
    theirs = metric.HaarPSI(C=c, alpha=alpha)(*(torch.from_numpy(i/255)[None,None].float() for i in (noisy, clean)))
    ours = METRICS[name].function(noisy[None,None]/255, Truth(clean[None,None]))
    assert abs(ours.item() - theirs.item()) < 1e-5                      # theirs in single precision


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


def test_conditions_without_a_channel():
    image = phantom(1, size=64, workers=1).images
    for text in "speckle=3@centre", "salt_pepper=5@attenuation", "blur=1.4", "blur=1.1,quantum=4@centre_literal":
        severity = Severity.parse(text)
        noisy = corrupt(image, severity, ["a"])
        for name in "median", "gaussian", "tv", "wavelet", "nlm", "bm3d": assert denoise(noisy, severity, name).shape == image.shape
        for name in "exact_nlm", "exact_bm3d", "poisson_bm3d":
            with pytest.raises(ValueError, match="states no law|needs quantum noise alone"): denoise(noisy, severity, name)


def radiographs(folder, n, size=256):
    "Radiographs of n patients, one each: the first in order of number that are there."
    table = nih_table(folder/"nih").drop_duplicates("patient_id")
    found = table[[(folder/"nih"/"images"/name).exists() for name in table.image]].head(n)
    images = np.stack([to_grey8(square(read_grey(folder/"nih"/"images"/name), size)) for name in found.image])
    about = pd.DataFrame({"image_id": found.image.tolist(), "patient_id": found.patient_id.tolist(), "split": "test"})
    return Radiographs("nih", TASKS["restore"], images, images[:, None], about, {})


def summary(data, conditions, names, reference):
    "The change from a reference, with its interval, by condition and denoiser."
    table = restoration_table(denoiser_records(data, conditions, names, metrics=["psnr"]), "psnr", reference)
    return table.set_index(["condition", "restorer"]).sort_index()


def test_bm3d_gains_two_decibels_where_noise_clips(real_data):
    found = summary(radiographs(real_data, 2), [Severity(0, 10)], ["bm3d", "exact_bm3d"], "bm3d")
    assert found.loc[("0,10", "exact_bm3d"), "change"] > 2


def test_15_in_the_published_scores_one_network_beats_the_denoisers_that_need_no_training():
    scores = pd.read_parquet(Path(__file__).parent.parent/"data"/"findings"/"restoration.parquet")
    mean = scores.pivot_table("psnr", ["condition", "image_id"], "restorer", observed=True).drop("0,0", level="condition")
    def gains(net, other): return (mean[net] - mean[other]).dropna().groupby(level="condition")
    for name in ("noisy", "median", "gaussian", "tv", "wavelet", "nlm"):
        gain = gains("nafnet", name).mean()
        assert len(gain) == 10 and gain.min() > .5, (name, gain)
    against = gains("nafnet", "bm3d")
    assert [against.size()[c] for c in ("0,1", "10,0", "0,10")] == [30]*3                           # one image of a patient
    assert all(ttest_1samp(gain, 0, alternative="greater").pvalue < .01 for _, gain in against)
    assert gains("exact_bm3d", "bm3d").mean()[["0,4", "0,10"]].min() > 2
    runs = {name: part for name, part in scores.groupby("restorer", observed=True) if name in ("noisy", "nafnet")}
    table = restoration_table(runs, "psnr", resamples=50).set_index(["restorer", "condition"])
    assert np.isclose(table.change["nafnet", "0,1"], gains("nafnet", "noisy").mean()["0,1"])
