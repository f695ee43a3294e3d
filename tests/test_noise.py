"The noise engine under random inputs, large images, forks and threads: what is too much for its notebook."
import math, multiprocessing, sys, threading
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from scipy.special import ndtr

from cxr_noise_study import noise
from cxr_noise_study.noise import (LADDER, N0, SIGMA0, NoiseChannel, Severity, corrupt, corrupt_deep, keyed_rng,
                                   photons_per_pixel)

CONDITIONS = [*LADDER[1:], *(Severity(*s) for s in ((.5, 0), (3.7, 0), (0, .5), (0, 3.7), (2.5, .3), (10, 10)))]
SEVERITIES = st.builds(Severity, st.sampled_from([0, .3, 1, 3.7, 10, 40]), st.sampled_from([0, .001, .5, 2, 10]))
NAMES = st.one_of(st.integers(), st.text(max_size=8))
slow = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def batches(draw):
    "Images of any small shape, with a severity, a name and a replicate for each, a seed and a way to draw."
    n, h, w = draw(st.tuples(st.integers(0, 6), st.integers(1, 40), st.integers(1, 40)))
    images = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(0, 256, (n, h, w), dtype=np.uint8)
    several = lambda values: draw(st.lists(values, min_size=n, max_size=n))
    return dict(images=images, severity=several(SEVERITIES), image_ids=several(NAMES),
                replicate=several(st.integers(0, 9)), seed=draw(st.integers(-2**40, 2**40)),
                coupled=draw(st.booleans()))


def part(batch, which):
    "The batch reduced to some of its images, in that order."
    return batch | {k: [batch[k][i] for i in which] for k in ("severity", "image_ids", "replicate")} \
                 | {"images": batch["images"][list(which)]}


@slow
@given(batches(), st.data())
def test_a_field_does_not_depend_on_its_batch(batch, data):
    whole, n = corrupt(**batch), len(batch["images"])
    order = data.draw(st.permutations(range(n)))
    assert (corrupt(**part(batch, order)) == whole[order]).all()
    cut = data.draw(st.integers(0, n))
    assert (np.concatenate([corrupt(**part(batch, range(cut))), corrupt(**part(batch, range(cut, n)))]) == whole).all()
    for i in range(n): assert (corrupt(**part(batch, [i]))[0] == whole[i]).all()


@slow
@given(batches(), st.tuples(*[st.sampled_from([1, 2, 3, -1, -2])]*3), st.permutations(range(3)), st.booleans())
def test_a_field_does_not_depend_on_memory(batch, steps, axes, writable):
    whole = corrupt(**batch)
    shape = [batch["images"].shape[a]*abs(s) for a, s in zip(axes, steps)]
    def view():                                                           # strided, reversed, with axes exchanged
        base = np.zeros(shape, np.uint8)[tuple(slice(None, None, s) for s in steps)]
        return base.transpose(np.argsort(axes))
    images, out = view(), view()
    images[:] = batch["images"]; images.setflags(write=writable)
    assert corrupt(**batch | {"images": images, "out": out}) is out and (out == whole).all()
    assert (images == batch["images"]).all()
    place = batch["images"].copy()
    assert (corrupt(**batch | {"images": place, "out": place}) == whole).all()


@slow
@given(batches())
def test_torch_spelling_draws_the_same_bits(batch):
    torch = pytest.importorskip("torch")
    images, n = torch.from_numpy(batch["images"]), len(batch["images"])
    assert (corrupt(**batch | {"images": images}).numpy() == corrupt(**batch)).all()
    keys = noise._batch_keys(n, *(batch[k] for k in ("seed", "image_ids", "severity", "replicate", "coupled")))
    for severity in {s for s in batch["severity"] if s != Severity()}:
        out = torch.zeros_like(images)
        noise._draw_torch(images, out, keys.reshape(n, 4), np.arange(n), severity, batch["coupled"])
        same = [i for i in range(n) if batch["severity"][i] == severity]
        assert (out.numpy()[same] == corrupt(**batch)[same]).all()


@slow
@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(allow_nan=True, allow_infinity=True))
def test_severities_are_refused_or_round_trip(s_q, s_e):
    if all(0 <= s <= 1e100 for s in (s_q, s_e)):
        severity = Severity(s_q, s_e)
        assert Severity.parse(str(severity)) == severity and hash(Severity.parse(str(severity))) == hash(severity)
    else:
        with pytest.raises(ValueError, match="finite number ≥ 0"): Severity(s_q, s_e)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.floats(1e-4, 1e4), st.floats(1e-6, 1e4), st.sampled_from(["quantum", "electronic", "mixed"]))
def test_any_channel_is_a_channel(s_q, s_e, kind):
    severity = Severity(s_q if kind != "electronic" else 0, s_e if kind != "quantum" else 0)
    channel = NoiseChannel(severity)
    assert channel.pmf.min() >= 0 and abs(channel.pmf.sum(1) - 1).max() < 1e-12
    assert (np.diff(np.cumsum(channel.pmf, 1), axis=0) < 1e-12).all()     # brighter in, brighter out: rows are ordered
    assert (channel.var >= 0).all() and 0 <= channel.information() <= 8
    units = np.diff(noise._cumulated(severity).astype(np.int64), axis=1, prepend=0)
    assert abs(units/2**32 - channel.pmf).max() < 2**-32


def test_quantum_channel_at_many_photons():
    "At 10⁷ photons per pixel, against tails summed with 30 digits; ties decided in integers."
    mp = pytest.importorskip("mpmath").mp
    mp.dps, photons, pmf = 30, 10**7, NoiseChannel(Severity(.01)).pmf
    assert photons_per_pixel(.01) == photons
    for g in (1, 100, 254, 255):
        lam, below = mp.mpf(g*photons)/255, []
        for j in range(255):
            count, rest = divmod((2*j + 1)*photons, 510)                  # the last count with 255·k/photons ≤ j + 1/2
            if rest == 0 and j % 2: count -= 1                            # a tie goes to the even level
            left = count < lam
            if abs(count - lam) > 12*mp.sqrt(lam): below.append(float(not left)); continue
            k = count if left else count + 1
            term = mp.exp(k*mp.log(lam) - lam - mp.loggamma(k + 1))
            tail = mp.mpf(0)
            while term > 1e-20:
                tail += term
                term, k = (term*k/lam, k - 1) if left else (term*lam/(k + 1), k + 1)
            below.append(float(tail if left else 1 - tail))
        assert abs(pmf[g] - np.diff(below, prepend=0, append=1)).max() < 1e-12, g


MANY = [Severity(*s) for s in ((.01, .03), (.01, 1e-4), (.02, 1e-5), (.01, 1e-6), (.05, 10))]


@pytest.mark.parametrize("severity", MANY, ids=str)
def test_mixed_channel_at_many_photons(severity):
    "At 4·10⁵ to 10⁷ photons per pixel, against the sum over all counts, its terms by recurrence in extended precision."
    photons, sigma, pmf = photons_per_pixel(severity.s_q), SIGMA0*severity.s_e, NoiseChannel(severity).pmf
    for g in (1, 100, 255):
        lam = g/255*photons
        k = np.arange(int(lam - 10*lam**.5), int(lam + 10*lam**.5))
        steps = np.log(np.longdouble(lam)/k); steps[0] = 0
        p = np.exp(np.cumsum(steps) - np.cumsum(steps).max()); p = (p/p.sum()).astype(float)
        below = []
        for e in (np.arange(255) + .5)/255:
            sure = abs(e - g/255) > 10*math.hypot(math.sqrt(lam)/photons, sigma)
            below.append(float(e > g/255) if sure else p@ndtr((e - k/photons)/sigma))
        assert abs(pmf[g] - np.diff(below, prepend=0, append=1)).max() < 1e-12, g


def chi_square_by_row(clean, noisy, pmf):
    "Pearson's p-value for every clean grey level; cells expecting less than 25 are pooled."
    counts = np.bincount(256*clean.ravel().astype(np.int64) + noisy.ravel(), minlength=65536).reshape(256, 256)
    assert counts[pmf == 0].sum() == 0
    for seen, hoped in zip(counts, counts.sum(1, keepdims=True)*pmf):
        big = hoped >= 25
        seen, hoped = np.append(seen[big], seen[~big].sum()), np.append(hoped[big], hoped[~big].sum())
        if hoped[-1] < 25:                                                # too thin for a cell: join the largest
            top = hoped[:-1].argmax()
            seen[top] += seen[-1]; hoped[top] += hoped[-1]; seen, hoped = seen[:-1], hoped[:-1]
        if len(seen) > 1: yield stats.chi2.sf(((seen - hoped)**2/hoped).sum(), len(seen) - 1)


@pytest.mark.parametrize("coupled", [False, True])
def test_every_row_of_the_sampler_is_the_channel(coupled):
    "19 conditions × 256 grey levels × 65,536 pixels; at most 10⁻⁴ false alarms over all rows of this test."
    clean = np.repeat(np.arange(256, dtype=np.uint8), 65536).reshape(16, 1024, 1024)
    draw = lambda s: corrupt(clean, s, range(16), seed=5, coupled=coupled)
    p = [p for s in CONDITIONS for p in chi_square_by_row(clean, draw(s), NoiseChannel(s).pmf)]
    assert len(p) > 200*len(CONDITIONS) and min(p) > 1e-4/len(p)
    assert stats.kstest(p, "uniform").pvalue > 1e-4                       # and uniform, as p-values should be


def test_a_large_image_and_its_tiles_of_work():
    "4096 × 4096, on one thread, on five, as a view, and through PyTorch in more than one chunk: one field."
    image = np.random.default_rng(0).integers(0, 256, (1, 4096, 4096), dtype=np.uint8)
    s = Severity(4, 2)
    whole = corrupt(image, s, ["large"], threads=1)
    assert (corrupt(image, s, ["large"], threads=5) == whole).all()
    assert (corrupt(np.asfortranarray(image), s, ["large"]) == whole).all()
    torch = pytest.importorskip("torch")
    out = torch.zeros(1, 4096, 4096, dtype=torch.uint8)
    key = noise._batch_keys(1, 0, ["large"], [s], 0, False)
    noise._draw_torch(torch.from_numpy(image), out, key, np.arange(1), s, False)
    assert (out.numpy() == whole).all()


def test_several_threads_may_call_at_once():
    images = np.random.default_rng(1).integers(0, 256, (8, 512, 512), dtype=np.uint8)
    expected, results = corrupt(images, Severity(3), range(8), threads=1), [None]*6
    def work(k): results[k] = corrupt(images, Severity(3), range(8), threads=2)
    workers = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for w in workers: w.start()
    for w in workers: w.join()
    assert all((r == expected).all() for r in results)


def _in_a_fork(queue, images): queue.put(corrupt(images, Severity(3), range(len(images)), threads=2))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_may_be_forked_after_threads_were_used():
    images = np.random.default_rng(2).integers(0, 256, (4, 512, 512), dtype=np.uint8)
    expected, context = corrupt(images, Severity(3), range(4), threads=2), multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_in_a_fork, args=(queue, images)); worker.start()
    assert (queue.get(timeout=60) == expected).all()
    worker.join(60)
    assert worker.exitcode == 0


def test_read_only_memory_maps(tmp_path):
    images = np.random.default_rng(3).integers(0, 256, (3, 50, 70), dtype=np.uint8)
    np.save(tmp_path/"images.npy", images)
    mapped = np.load(tmp_path/"images.npy", mmap_mode="r")
    assert (corrupt(mapped, Severity(2, 1), range(3)) == corrupt(images, Severity(2, 1), range(3))).all()


@slow
@given(NAMES, SEVERITIES, st.integers(0, 99), st.sampled_from([np.uint8, np.uint16, np.int16, np.float32, np.float64]))
def test_deep_images_keep_range_type_and_name(name, severity, seed, dtype):
    full = {np.uint8: 255, np.uint16: 4095, np.int16: 2047}.get(dtype, 1)
    image = (np.random.default_rng(seed).random((7, 9))*full).astype(dtype)
    noisy = corrupt_deep(image, severity, name, full, seed)
    assert noisy.dtype == dtype and noisy.shape == image.shape
    assert (noisy == corrupt_deep(image, severity, name, full, seed)).all()
    if np.dtype(dtype).kind != "f": assert 0 <= noisy.min() and noisy.max() <= full
    if severity == Severity(): assert (noisy == image).all()
    assert (keyed_rng(severity, name, seed).random(4) == keyed_rng(severity, name, seed).random(4)).all()


@pytest.mark.skipif(not find_spec("medmnistc"), reason="medmnistc is not installed")
def test_medmnistc_draws_what_the_crosswalk_says():
    "Mean and variance of 10⁶ pixels of its mildest levels at a middle grey, within 5.3 standard errors (10⁻⁷ each)."
    from medmnistc.corruptions.registry import CORRUPTIONS_DS
    convert = {"shot_noise": lambda c: Severity(math.sqrt(N0/c), 0), "gaussian_noise": lambda c: Severity(0, c/SIGMA0)}
    for data in ("chestmnist", "pneumoniamnist"):
        for kind, severity in convert.items():
            theirs = CORRUPTIONS_DS[data][kind]
            s, n, grey = severity(theirs.severity_params[0]), 10**6, 90
            channel = NoiseChannel(s)
            np.random.seed(0)                                             # theirs knows only the global generator
            x = theirs.apply(np.full((1000, 1000), grey, np.uint8), severity=0)/255
            error = math.sqrt(channel.var[grey]/n)
            assert abs(x.mean() + .5/255 - channel.mean[grey]) < 5.3*error + .1/255, (data, kind)  # theirs truncates
            assert abs(x.var() - channel.var[grey]) < 5.3*channel.var[grey]*math.sqrt(2.1/n) + .1/255**2, (data, kind)
