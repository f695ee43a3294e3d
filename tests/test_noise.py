"The noise engine under random inputs, large images, forks and threads: what is too much for its notebooks."
import hashlib, json, math, multiprocessing, os, pickle, subprocess, sys, threading, tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from scipy.ndimage import gaussian_filter
from scipy.special import ndtr

from cxr_noise_study import channel
from cxr_noise_study.channel import NoiseChannel, corrupt, corrupt_deep, is_pixelwise, keyed_rng
from cxr_noise_study.noise import (LADDER, LADDERS, N0, REGIONS, SIGMA0, SOURCES, Severity, Source, TrainNoise,
                                   add_noise, parse_ladder, photons_per_pixel, sort_conditions, to_8bit)
from cxr_noise_study.tables import extension_digest, load_extensions


def kill(intensity, s, rng): return np.where(rng.random(intensity.shape) < s, 0, intensity)
def kill_law(intensity, bounds, s): return (1 - s)*(intensity[:,None] <= bounds) + s*(bounds >= 0)
def scale(intensity, s, rng): return intensity*rng.uniform(1 - s, 1 + s, intensity.shape)
def scale_law(intensity, bounds, s):
    factor = np.divide(bounds, intensity[:,None], out=np.where(bounds >= 0, 9., -9.)*np.ones((len(intensity), 1)),
                       where=intensity[:,None] > 0)
    return np.clip((factor - 1 + s)/(2*s), 0, 1)


@pytest.fixture(autouse=True, scope="module")
def sources():
    "Further sources for this module alone."
    before = dict(SOURCES)
    for stage in (10, 30, 50):
        SOURCES.register(Source(f"dead_{stage}", stage, "s is the share of pixels set to 0", kill, kill_law, most=1))
    SOURCES.register(Source("scale", 15, "a factor within 1 ± s", scale, scale_law, most=1))
    yield
    for name in {*SOURCES} - {*before}: del SOURCES[name]


CONDITIONS = [*LADDER[1:], *(Severity(*s) for s in ((.5, 0), (3.7, 0), (0, .5), (0, 3.7), (2.5, .3), (10, 10)))]
STRENGTHS = {"quantum": [.3, 1, 3.7, 10, 40], "electronic": [.001, .5, 2, 10], "dead_30": [.1, 1], "blur": [.5, 2.],
             "speckle@centre": [.3, 3], "quantum@attenuation": [2]}
SEVERITIES = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in STRENGTHS.items()}
                                   ).map(lambda strengths: Severity(**strengths))
NAMES = st.one_of(st.integers(), st.text(max_size=8))
slow = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def batches(draw):
    "Images of any small shape, with a severity, a name and a replicate for each, a seed and a way to draw."
    n, h, w = draw(st.tuples(st.integers(0, 6), st.integers(1, 40), st.integers(1, 40)))
    images = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(0, 256, (n, h, w), dtype=np.uint8)
    several = lambda values: draw(st.lists(values, min_size=n, max_size=n))
    return dict(images=images, severity=several(SEVERITIES), image_ids=several(NAMES),
                replicate=several(st.integers(0, 9)), seed=draw(st.integers(-2**40, 2**40)))


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
def test_tensors_get_the_same_bits(batch):
    torch = pytest.importorskip("torch")
    images = torch.from_numpy(batch["images"])
    assert (corrupt(**batch | {"images": images}).numpy() == corrupt(**batch)).all()
    place = images.clone()
    assert corrupt(**batch | {"images": place, "out": place}) is place and (place.numpy() == corrupt(**batch)).all()


@slow
@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(allow_nan=True, allow_infinity=True))
def test_severities_are_refused_or_round_trip(s_q, s_e):
    if all(0 <= s <= 1e100 for s in (s_q, s_e)):
        severity = Severity(s_q, s_e)
        assert Severity.parse(str(severity)) == severity and hash(Severity.parse(str(severity))) == hash(severity)
    else:
        with pytest.raises(ValueError, match="must be finite and ≥ 0|must be at most 1e\\+100"): Severity(s_q, s_e)


@slow
@given(SEVERITIES, SEVERITIES)
def test_conditions_of_any_sources(a, b):
    assert Severity.parse(str(a)) == a == pickle.loads(pickle.dumps(a)) and eval(f"Severity.parse({str(a)!r})") == a
    assert (str(a) == str(b)) == (a == b) and (a == b) + (a < b) + (b < a) == 1
    assert all(a[name] > 0 for name in a.sources) and bool(a) == (a != Severity())
    assert [SOURCES[name].stage for name in a.sources] == sorted(SOURCES[name].stage for name in a.sources)
    assert parse_ladder(f"{a} {b}") == tuple(dict.fromkeys([Severity(), a, b]))
    assert sort_conditions([str(b), "zz=1", str(a)]) == [*map(str, sorted([a, b])), "zz=1"]
    with pytest.raises(AttributeError): a.strengths = ()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.floats(1e-4, 1e4), st.floats(1e-6, 1e4), st.sampled_from(["quantum", "electronic", "mixed"]))
def test_any_channel_is_a_channel(s_q, s_e, kind):
    severity = Severity(s_q if kind != "electronic" else 0, s_e if kind != "quantum" else 0)
    exact = NoiseChannel(severity)
    pmf = exact.pmf
    assert pmf.min() >= 0 and abs(pmf.sum(1) - 1).max() < 1e-12
    assert (np.diff(np.cumsum(pmf, 1), axis=0) < 1e-12).all()             # brighter in, brighter out: rows are ordered
    assert (exact.var >= 0).all() and 0 <= exact.information() <= 8
    units = np.diff(channel._cumulated(pmf).astype(np.int64), axis=1, prepend=0)
    assert abs(units/2**32 - pmf).max() < 2**-32


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
        if not seen.any(): continue
        big = hoped >= 25
        seen, hoped = np.append(seen[big], seen[~big].sum()), np.append(hoped[big], hoped[~big].sum())
        if hoped[-1] < 25:                                                # too thin for a cell: join the largest
            top = hoped[:-1].argmax()
            seen[top] += seen[-1]; hoped[top] += hoped[-1]; seen, hoped = seen[:-1], hoped[:-1]
        if len(seen) > 1: yield stats.chi2.sf(((seen - hoped)**2/hoped).sum(), len(seen) - 1)


def test_every_row_of_the_sampler_is_the_channel():
    "19 conditions × 256 grey levels × 65,536 pixels; at most 10⁻⁴ false alarms over all rows of this test."
    clean = np.repeat(np.arange(256, dtype=np.uint8), 65536).reshape(16, 1024, 1024)
    p = [p for s in CONDITIONS
         for p in chi_square_by_row(clean, corrupt(clean, s, range(16), seed=5), NoiseChannel(s).pmf)]
    assert len(p) > 200*len(CONDITIONS) and min(p) > 1e-4/len(p)
    assert stats.kstest(p, "uniform").pvalue > 1e-4                       # and uniform, as p-values should be


def test_a_cheaper_sampler_would_be_noticed():
    "Inverting the distribution function with 16-bit words, on 4 million pixels of one grey level."
    s, flat = Severity(0, 1), np.full((1, 2048, 2048), 128, np.uint8)
    words = np.random.default_rng(5).integers(0, 2**16, flat.size, dtype=np.uint32)
    below = np.cumsum(NoiseChannel(s).pmf[128])
    inverse = np.searchsorted(below, np.arange(2**16)/2**16, side="right").astype(np.uint8)
    cheap, = chi_square_by_row(flat, inverse[words].reshape(flat.shape), NoiseChannel(s).pmf)
    ours, = chi_square_by_row(flat, corrupt(flat, s, ["flat"]), NoiseChannel(s).pmf)
    assert cheap < 1e-10 and ours > 1e-4


MIXTURES = [dict(dead_10=.1, quantum=4), dict(dead_10=.1, electronic=2), dict(dead_10=.1, quantum=4, electronic=2),
            dict(quantum=4, dead_30=.1), dict(quantum=1, dead_30=.1, electronic=2),
            dict(quantum=4, electronic=2, dead_50=.1), dict(dead_10=.1, quantum=4, dead_30=.2, electronic=1, dead_50=.1),
            dict(scale=.3), dict(scale=.3, electronic=1),
            dict(scale=.3, quantum=4), dict(scale=.3, quantum=4, electronic=1), dict(scale=.3, dead_50=.1),
            dict(speckle=3), dict(salt_pepper=10), dict(quantum=4, speckle=3), dict(scale=.3, speckle=3),
            dict(quantum=1, speckle=3, electronic=1, salt_pepper=10)]


@pytest.mark.parametrize("strengths", MIXTURES, ids=str)
def test_mixtures_of_registered_sources(strengths):
    "Channel against the float definition and against the sampler: 2 × 256 rows × 8,192 pixels, 10⁻⁴ false alarms each."
    s = Severity(**strengths)
    clean = np.repeat(np.arange(256, dtype=np.uint8), 8192).reshape(2, 1024, 1024)
    pmf = NoiseChannel(s).pmf
    pmf = np.where(pmf < 1e-13, 0, pmf)                                   # rounding errors of sums
    for noisy in (to_8bit(add_noise(clean/255, s, np.random.default_rng(0))), corrupt(clean, s, ["a", "b"])):
        p = [*chi_square_by_row(clean, noisy, pmf)]
        assert min(p) > 1e-4/len(p)


def test_dead_pixels_have_the_exact_channel():
    "Closed form: a row of the other sources' channel, and for the dead share what those make of a black pixel."
    for rest in (dict(quantum=4), dict(electronic=2), dict(quantum=4, electronic=2), dict(quantum=.3, electronic=.3)):
        pmf, readout = NoiseChannel(Severity(**rest)).pmf, NoiseChannel(Severity(0, rest.get("electronic", 0))).pmf[0]
        black = {10: pmf[0], 30: readout, 50: np.eye(256)[0]}
        for stage, row in black.items():
            mixed = NoiseChannel(Severity(**{f"dead_{stage}": .2}, **rest)).pmf
            assert abs(mixed - .8*pmf - .2*row).max() < 1e-12, (stage, rest)


def test_the_direct_path_is_the_float_definition():
    clean = np.random.default_rng(0).integers(0, 256, (2, 40, 50), dtype=np.uint8)
    s = Severity(blur=1.5, quantum=3)
    assert not is_pixelwise(s)
    for image, name, noisy in zip(clean, "ab", corrupt(clean, s, "a b".split(), seed=2)):
        assert (noisy == to_8bit(add_noise(image/255, s, keyed_rng(s, name, seed=2)))).all()
    alone = corrupt(clean, Severity(blur=1), ["a", "b"])                  # deterministic: the name plays no part
    assert (alone == corrupt(clean, Severity(blur=1), [1, 2])).all()
    assert (alone == [to_8bit(gaussian_filter(image/255, 1, mode="mirror", radius=2)) for image in clean]).all()
    with pytest.raises(ValueError, match="blur states no law"): NoiseChannel(s).pmf


def test_a_source_that_is_registered_again_has_a_new_channel():
    image = np.full((1, 64, 64), 200, np.uint8)
    for target in (50, 60):
        SOURCES.register(Source("stuck", 30, "s is the share of pixels stuck", most=1,
                                sample=lambda x, s, rng: np.where(rng.random(x.shape) < s, target/255, x),
                                law=lambda x, b, s: (1 - s)*(x[:,None] <= b) + s*(b >= target/255)))
        assert set(np.unique(corrupt(image, Severity(stuck=.5), ["a"]))) == {target, 200}
    SOURCES.pop("stuck")


def digest(array): return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def test_fields_are_the_bits_that_they_were():
    "Digests taken in November 2026, before sources became table entries; of floats to 9 decimals, as NumPy draws them."
    known = json.loads((Path(__file__).parent/"data"/"field_digests.json").read_text())
    i, j = np.mgrid[:97,:131]
    image = ((i*7 + j*13 + (i*j)//11) % 256).astype(np.uint8)
    for name, expected in known["8-bit"].items():
        condition, image_id, seed, replicate = name.split("|")
        image_id = int(image_id) if image_id.isdigit() else image_id.strip("'")
        noisy = corrupt(image, Severity.parse(condition), image_id, int(seed), int(replicate))
        assert digest(noisy) == expected, name
    if known["numpy"].split(".")[:2] != np.__version__.split(".")[:2]: pytest.skip("NumPy may draw other floats")
    for condition, expected in known["float"].items():
        assert digest(corrupt_deep(image/255, Severity.parse(condition), "a.png", seed=1).round(9)) == expected
    for condition, expected in known["12-bit"].items():
        deep = image.astype(np.uint16)*16
        assert digest(corrupt_deep(deep, Severity.parse(condition), "a.png", 4095, seed=1)) == expected


def test_training_noise_is_drawn_as_ever():
    "A term by its weight, then a uniform place between both ends of each of the pair, rounded to one decimal."
    for text, terms in (("0..10,0", [(0, 10, 0, 0)]), ("0..10,0..4", [(0, 10, 0, 4)]),
                        ("0.5*clean+0.5*0..10,1", [(0, 0, 0, 0), (0, 10, 1, 1)])):
        drawn, stream = TrainNoise.parse(text).draw(np.random.default_rng(3), 200), np.random.default_rng(3)
        which, places = stream.choice(len(terms), size=200, p=[1/len(terms)]*len(terms)), stream.random((200, 2))
        for severity, k, (u, v) in zip(drawn, which, places):
            a, b, c, d = terms[k]
            assert severity == Severity(round(a + (b - a)*u, 1), round(c + (d - c)*v, 1))
    assert TrainNoise.parse("ladder").draw(np.random.default_rng(0), 3) \
        == [LADDER[k] for k in np.random.default_rng(0).choice(14, size=3, p=[1/14]*14)]


def test_training_noise_of_any_source():
    regime = TrainNoise.parse("0.5*clean + 0.5*dead_30=0..0.05,quantum=2")
    assert str(regime) == "0.5*clean+0.5*quantum=2,dead_30=0..0.05" and TrainNoise.parse(str(regime)) == regime
    shares = [s["dead_30"] for s in regime.draw(np.random.default_rng(0), 1000) if s]
    assert 0 <= min(shares) < .005 and .045 < max(shares) <= .05 and len(set(shares)) > 20
    with pytest.raises(ValueError, match="at most 1"): TrainNoise.parse("dead_30=0..2")
    with pytest.raises(ValueError, match="'fog' is not one of"): TrainNoise.parse("fog=0..2")


def test_training_noise_in_a_region():
    regime = TrainNoise.parse("0.25*speckle=0..3@centre + 0.75*quantum=1..2@attenuation, electronic=1")
    assert str(regime) == "0.25*speckle=0..3@centre+0.75*quantum=1..2@attenuation,electronic=1"
    assert TrainNoise.parse(str(regime)) == regime
    drawn = regime.draw(np.random.default_rng(0), 1000)
    assert abs(np.mean([s.sources == ("speckle@centre",) for s in drawn]) - .25) < 5*(.25*.75/1000)**.5 + .02
    assert all(0 <= s["speckle@centre"] <= 3 and s["quantum@attenuation"] <= 2 and s.s_q == 0 for s in drawn)
    assert {*TrainNoise.parse("nonuniform").draw(np.random.default_rng(0), 99)} == {*LADDERS["nonuniform"]}
    with pytest.raises(ValueError, match="region 'center' is not one of"): TrainNoise.parse("speckle=0..3@center")
    with pytest.raises(ValueError, match="ends below its start"): TrainNoise.parse("speckle=3..1@centre")


@pytest.mark.parametrize("name", ["speckle", "salt_pepper", "blur", "quantum", "electronic", "dead_30"])
@pytest.mark.parametrize("region", [*REGIONS])
def test_outside_the_region_pixels_are_as_they_were(name, region):
    image = np.random.default_rng(7).integers(0, 256, (2, 60, 90), dtype=np.uint8)
    s = Severity(**{f"{name}@{region}": SOURCES[name].most if name == "dead_30" else 5})
    noisy = corrupt(image, s, ["a", "b"], seed=3)
    for clean, new, key in zip(image, noisy, "ab"):
        inside = keyed_rng(s, key, seed=3).random(clean.shape) < REGIONS[region].share(clean/255)
        assert (new == clean)[~inside].all() and (new != clean)[inside].any() and inside.any() and not inside.all()
    assert (corrupt(image[1], s, "b", seed=3) == noisy[1]).all()


def test_noise_follows_attenuation():
    "Half black, half white: none in the black, all over the white, but for the smoothed edge."
    image = np.zeros((128, 128), np.uint8)
    image[:,64:] = 255
    noisy = corrupt(image, Severity(**{"salt_pepper@attenuation": 100}), "a")
    assert (noisy[:,:48] == 0).all() and abs((noisy[:,80:] == 0).mean() - .5) < 5*(.25/noisy[:,80:].size)**.5


def test_a_sampler_must_keep_the_shape():
    SOURCES.register(Source("crop", 30, "", lambda x, s, rng: x[1:]))
    with pytest.raises(ValueError, match="crop must return intensities of shape"):
        corrupt(np.zeros((4, 5), np.uint8), Severity(crop=1), "a")
    SOURCES.pop("crop")


def test_extensions(tmp_path):
    good, bad = tmp_path/"fog.py", tmp_path/"bad.py"
    good.write_text("from cxr_noise_study.noise import SOURCES, Source\n"
                    "SOURCES.register(Source('fog', 10, '', lambda x, s, rng: x + s))\nassert __name__ != '__main__'\n")
    bad.write_text("1/0")
    code = "from cxr_noise_study.tables import load_extensions; from cxr_noise_study.noise import Severity;" \
           f"load_extensions({str(good)!r}); load_extensions([{str(good)!r}]);" \
           "print(Severity.parse('fog=2,quantum=1'))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert printed.strip() == "fog=2,quantum=1"
    with pytest.raises(ValueError, match="bad.py: ZeroDivisionError: division by zero"): load_extensions(bad)
    assert extension_digest(good) != extension_digest(bad) and extension_digest("") is None
    assert len(str(pytest.raises(ValueError, load_extensions, tmp_path/"none.py").value).splitlines()) == 1


def test_a_batch_needs_little_memory():
    "Less than 2 MiB beside input and output, however the images lie; the tables of a new severity need less than 24."
    def extra(*args):
        tracemalloc.start(); out = corrupt(*args); peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        return (peak - out.nbytes)/2**20
    batch, ladder = np.zeros((16, 512, 512), np.uint8), [LADDER[k % 14] for k in range(16)]
    for args in ((batch, Severity(4, 2)), (batch, ladder), (batch[:,::-1,::2], Severity(4, 2)),
                 (batch.transpose(0, 2, 1), ladder)):
        corrupt(*args, range(16))
        assert extra(*args, range(16)) < 2
    for new in (Severity(0, 3.1), Severity(3.1), Severity(3.1, 3.1), Severity(3.1, 1e-3)):
        assert extra(batch, new, range(16)) < 24


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (1, 1, 1), (3, 1, 257), (2, 255, 1)], ids=str)
def test_sizes_at_the_edges(shape):
    assert corrupt(np.zeros(shape, np.uint8), Severity(4, 2), range(shape[0])).shape == shape


def test_what_corrupt_refuses():
    images, ids, s = np.zeros((9, 30, 42), np.uint8), [str(k) for k in range(9)], Severity(4, 2)
    def refused(match, *args, **kwargs):
        with pytest.raises(ValueError, match=match): corrupt(*args, **kwargs)
    refused("corrupt_deep", images/255, s, ids)
    refused("corrupt_deep", images.astype(np.uint16), s, ids)
    refused("one grey channel", images[...,None], s, ids)
    refused(r"must be \(n, h, w\)", images[0,0], s, ids)
    for bad, match in ((ids[:3], "9 images, got 3"), ("abc", "one for each of 9"), ([1.5]*9, "float"),
                       ([True]*9, "bool"), (None, "NoneType")): refused(match, images, s, bad)
    refused("severity must be one for each of 9", images, [s]*2, ids)
    refused("must be like images", images, s, ids, out=images[:,:,1:])
    refused("not overlap", images[:8], s, ids[:8], out=images[1:])


def test_a_large_image_and_its_tiles_of_work():
    "4096 × 4096, on one thread, on five, as a view, and as a tensor: one field."
    image = np.random.default_rng(0).integers(0, 256, (1, 4096, 4096), dtype=np.uint8)
    s = Severity(4, 2)
    whole = corrupt(image, s, ["large"], threads=1)
    assert (corrupt(image, s, ["large"], threads=5) == whole).all()
    assert (corrupt(np.asfortranarray(image), s, ["large"]) == whole).all()
    torch = pytest.importorskip("torch")
    assert (corrupt(torch.from_numpy(image), s, ["large"]).numpy() == whole).all()


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


def test_medmnistc_draws_what_the_crosswalk_says():
    "Mean and variance of 10⁶ pixels of its mildest levels at a middle grey, within 5.3 standard errors (10⁻⁷ each)."
    registry = pytest.importorskip("medmnistc.corruptions.registry", exc_type=ImportError)  # and its ImageMagick
    convert = {"shot_noise": lambda c: Severity(math.sqrt(N0/c), 0), "gaussian_noise": lambda c: Severity(0, c/SIGMA0)}
    for data in ("chestmnist", "pneumoniamnist"):
        for kind, severity in convert.items():
            theirs = registry.CORRUPTIONS_DS[data][kind]
            s, n, grey = severity(theirs.severity_params[0]), 10**6, 90
            exact = NoiseChannel(s)
            np.random.seed(0)                                             # theirs knows only the global generator
            x = theirs.apply(np.full((1000, 1000), grey, np.uint8), severity=0)/255
            error = math.sqrt(exact.var[grey]/n)
            assert abs(x.mean() + .5/255 - exact.mean[grey]) < 5.3*error + .1/255, (data, kind)  # theirs truncates
            assert abs(x.var() - exact.var[grey]) < 5.3*exact.var[grey]*math.sqrt(2.1/n) + .1/255**2, (data, kind)


# ---- odd and hostile input

def test_14_13_a_scale_that_the_type_cannot_hold_is_refused():
    for dtype, most in ((np.uint8, 255), (np.uint16, 65535), (np.int16, 32767), (np.float16, 65504)):
        image = np.full((4, 5), 100, dtype)
        if dtype != np.float16: assert corrupt_deep(image, Severity(0, 10), "a", most).max() <= most
        with pytest.raises(ValueError, match="max_value must be > 0 and ≤"): corrupt_deep(image, Severity(0, 10), "a", most*2)
    for bad in (math.nan, math.inf, 0, -1):
        with pytest.raises(ValueError, match="max_value"): corrupt_deep(np.zeros(3), Severity(1), "a", bad)


def test_14_13_ids_in_a_set_are_refused():
    images = np.zeros((2, 4, 5), np.uint8)
    for ids in ({"a", "b"}, frozenset({"a", "b"})):
        with pytest.raises(ValueError, match="image_ids must have an order, as a list has, got a set"):
            corrupt(images, Severity(4), ids)
    assert (corrupt(images, Severity(4), {"a": 1, "b": 2}.keys()) == corrupt(images, Severity(4), ["a", "b"])).all()


def test_14_13_masked_arrays_are_refused():
    masked = np.ma.masked_less(np.arange(20.).reshape(4, 5)/20, .3)
    rng, grey = np.random.default_rng(0), np.ma.masked_less(np.arange(20, dtype=np.uint8).reshape(4, 5), 7)
    for call in (lambda: add_noise(masked, Severity(1, 1), rng), lambda: corrupt_deep(masked, Severity(1), "a"),
                 lambda: to_8bit(masked), lambda: corrupt(grey, Severity(1), "a")):
        with pytest.raises(ValueError, match="would lose its mask"): call()
    assert corrupt(grey.filled(0), Severity(1), "a").shape == (4, 5)


def test_14_13_a_read_only_output_is_refused():
    images = np.zeros((2, 4, 5), np.uint8)
    images.setflags(write=False)
    for out in (images, np.broadcast_to(np.uint8(0), (2, 4, 5))):
        with pytest.raises(ValueError, match="out must be writeable, got a read-only array"):
            corrupt(images, Severity(4), "ab", out=out) if out is images else corrupt(images, Severity(4), ["a", "b"], out=out)


def test_14_13_without_the_compiler_there_is_one_line():
    code = "import numpy as np; from cxr_noise_study.channel import corrupt; from cxr_noise_study.noise import Severity\n" \
           "try: corrupt(np.zeros((1, 8, 8), np.uint8), Severity(4), ['a'])\nexcept ValueError as e: print(e)"
    done = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], capture_output=True, text=True,
                          env=os.environ | {"NUMBA_DISABLE_JIT": "1"})
    assert done.stdout.startswith("NUMBA_DISABLE_JIT must not be set") and not done.stderr, done


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("severity", [Severity(0, 1e-310), Severity(0, 5e-324), Severity(1e-200, 1e-200), Severity(5e-324)], ids=str)
def test_severities_too_small_to_matter_warn_of_nothing(severity):
    assert (NoiseChannel(severity).pmf == np.eye(256)).all()


def test_14_3_integer_ids_key_the_same_noise():
    "As Python's and NumPy's integers, in a range, an array, a series; in `corrupt` and in `evaluate_robustness`."
    import pandas as pd
    from cxr_noise_study.evaluation import evaluate_robustness
    images, s, seen = np.full((3, 32, 32), 128, np.uint8), Severity(4), []
    expected = corrupt(images, s, [5, 6, 7])
    for ids in (range(5, 8), np.arange(5, 8), [np.int64(5), 6, np.uint8(7)], pd.Series([5, 6, 7])):
        assert (corrupt(images, s, ids) == expected).all()
        seen.clear()
        def model(x):
            seen.append(np.rint(np.asarray(x)[:, 0]*255).astype(np.uint8))
            return x[:, :1] - .5
        evaluate_robustness(model, images, images*0 + (np.arange(32) > 9).astype(np.uint8), ["4,0"], output="logits",
                            channels=1, image_ids=ids, progress=False)
        noisy = np.concatenate(seen)
        assert all((image == noisy).all((1, 2)).any() for image in expected)


def test_14_3_a_ladder_of_one_text_is_read():
    assert parse_ladder(["0,0"]) == (Severity(),) == parse_ladder(np.array(["0,0"])) == parse_ladder([(0, 0)])
    assert parse_ladder(["4,2"]) == (Severity(), Severity(4, 2)) == parse_ladder(np.array([[4, 2]]))
