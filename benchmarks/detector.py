"""Time correlated noise and a lower dose: this package against its peers, interleaved, on one thread.

    python benchmarks/detector.py [--sizes 512 3072] [--repeats 15] [--output benchmarks/results/detector.csv]

Every method draws Gaussian noise with the quantum noise power of the CsI panel, the frequency response computed before
where the method allows. Peers: NumPy's and SciPy's complex transform in double precision, the usual way; SciPy's
convolution with a kernel; powerbox and gstools, libraries of random fields (`pip install powerbox gstools`; not
installed: named and left out). Beside it: the detector source and `reduce_dose` on a whole image. In every round all
methods have one turn, in an order drawn anew; a turn is one call to warm the caches and one that is timed, in processor
time of the thread. Results are written only with `--output`. Each script ends with its ratio.
"""
import argparse, csv, os, time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"): os.environ[name] = "1"  # before NumPy loads

import numpy as np
from scipy import fft, signal
from cxr_noise_study.detector import CSI, filtered, noise_shape
from cxr_noise_study.dose import detector_noise, reduce_dose

OURS, SLOW = "cxr_noise_study", {"gstools": 512}                           # gstools: larger fields take minutes


def correlated(size, missing):
    "Ways to draw noise of the detector's spectrum: name → function without arguments."
    shape, rng = (size, size), np.random.default_rng(0)
    amplitude = noise_shape(CSI, shape, CSI.pixel_mm)[0]
    whole = np.sqrt(CSI.quantum_power(np.hypot(*np.meshgrid(*[np.fft.fftfreq(size, CSI.pixel_mm)]*2))))
    kernel = np.fft.fftshift(np.fft.ifft2(whole).real)[size//2 - 31:size//2 + 32, size//2 - 31:size//2 + 32]
    ways = {OURS: lambda: filtered(rng.standard_normal(shape, np.float32), amplitude),
            "numpy, fft2": lambda: np.fft.ifft2(np.fft.fft2(rng.standard_normal(shape))*whole).real,
            "scipy, fft2": lambda: fft.ifft2(fft.fft2(rng.standard_normal(shape))*whole).real,
            "scipy, kernel of 63 × 63": lambda: signal.oaconvolve(rng.standard_normal(shape), kernel, mode="same")}
    try:
        from powerbox import PowerBox
        def power(f): return CSI.quantum_power(f)*CSI.pixel_mm**2
        box = dict(N=size, dim=2, pk=power, boxlength=size*CSI.pixel_mm, nthreads=1, a=0, b=2*np.pi)
        ways["powerbox"] = lambda: PowerBox(**box).delta_x()
    except ImportError: missing.add("powerbox")
    try:
        import gstools
        model, x = gstools.Exponential(dim=2, var=1, len_scale=CSI.pixel_mm), np.arange(size)*CSI.pixel_mm
        field = gstools.SRF(model, mode_no=100)                           # 100 waves: fewer than a spectrum needs
        ways["gstools"] = lambda: field.structured([x, x], seed=int(rng.integers(1 << 30)))
    except ImportError: missing.add("gstools")
    return {name: way for name, way in ways.items() if size <= SLOW.get(name, size)}


def whole_images(size):
    "What a user calls, on an image: name → function without arguments."
    rng, image = np.random.default_rng(0), np.random.default_rng(1).random((size, size))
    return {"source detector, severity 1": lambda: detector_noise(image, 1., rng),
            "reduce_dose to .5": lambda: reduce_dose(image, .5, 1e4, CSI.pixel_mm, rng)}


def measure(ways, repeats):
    "Median seconds of each way, all interleaved."
    order, seconds = np.random.default_rng(0), {name: [] for name in ways}
    for _ in range(repeats):
        for name in order.permutation([*ways]):
            ways[name]()
            start = time.thread_time()
            ways[name]()
            seconds[name].append(time.thread_time() - start)
    return {name: float(np.median(s)) for name, s in seconds.items()}


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sizes", type=int, nargs="+", default=[512, 3072])
    options.add_argument("--repeats", type=int, default=15)
    options.add_argument("--output", type=Path)
    args, missing, rows, ratios = options.parse_args(), set(), [], []
    for size in args.sizes:
        repeats = max(3, args.repeats*512//size)
        ours = measure(ways := correlated(size, missing), repeats)
        for name, seconds in (ours | measure(whole_images(size), repeats)).items():
            rows.append(dict(pixels=size, method=name, milliseconds=round(1000*seconds, 2)))
            print(f"{size:5}² {name:32} {1000*seconds:9.1f} ms")
        best = min(s for name, s in ours.items() if name != OURS)
        ratios.append(f"{size}²: {best/ours[OURS]:.1f}")
    if missing: print("not installed:", ", ".join(sorted(missing)))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with open(args.output, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(f"fastest peer over {OURS}, correlated noise: {'; '.join(ratios)}")


if __name__ == "__main__": main()
