"""Time noise on an 8-bit radiograph: this package against its peers, interleaved, on one thread.

    python benchmarks/noise.py [--size 512] [--repeats 30] [--output benchmarks/results/noise.csv]

Every method takes the same uint8 image and returns a noisy uint8 image (or the nearest thing the peer offers), at the
severities 1, 4 and 10 of each source. In every round all methods have one turn, in an order drawn anew, so that a
change in the machine's speed meets them alike; a turn is one call to warm the caches, as in a series of images, and one
that is timed. Time is processor time of the calling thread, so that other work on the machine does not count; a peer
that used more threads than it should would only look better. Peers that are not installed are named and left out
(`pip install .[peers]`). Results are written only with `--output`.
"""
import argparse, csv, os, platform, time, tracemalloc
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"): os.environ[name] = "1"  # before NumPy loads

import numpy as np
import torch
from numba import njit
from cxr_noise_study.channel import _BLOCK, _channel_pmf, _philox, NoiseChannel, corrupt
from cxr_noise_study.noise import LADDER, N0, SIGMA0, Severity
from cxr_noise_study.phantom import phantom

OURS, SEVERITIES = "cxr_noise_study", (1, 4, 10)
PACKAGES = ("numpy", "torch", "numba", "scikit-image", "medmnistc", "albumentations", "opencv-python-headless")


@njit(nogil=True)
def philox_words(out):
    "Fill out with the random words that an image of this many pixels needs."
    blocks = out.reshape(-1, 4, _BLOCK//4)
    for block in range(len(blocks)): _philox(blocks[block], block*(_BLOCK//4), 1, 2, 3, 4)


def quantum_peers(image, s, missing):
    "Photon noise of severity s by every peer: name → function without arguments."
    photons, rng = N0/s**2, np.random.default_rng(0)
    tensor, generator = torch.from_numpy(image), torch.Generator().manual_seed(0)
    def numpy_poisson():
        return np.rint(np.clip(rng.poisson(image*(photons/255))*(255/photons), 0, 255)).astype(np.uint8)
    def torch_poisson():
        counts = torch.poisson(tensor.float().mul_(photons/255), generator=generator)
        return counts.mul_(255/photons).round_().clamp_(0, 255).to(torch.uint8)
    def imagecorruptions():                                               # its formula; its corrupt() adds two channels
        return np.uint8(np.clip(np.random.poisson(image/255.*photons)/float(photons), 0, 1)*255)
    peers = {"numpy": numpy_poisson, "torch": torch_poisson, "imagecorruptions, formula": imagecorruptions}
    try:
        from skimage.util import random_noise                             # its photons are 256 for any image of ours
        peers["scikit-image"] = lambda: np.rint(random_noise(image, mode="poisson", rng=rng)*255).astype(np.uint8)
    except ImportError: missing.add("scikit-image")
    try:
        from medmnistc.corruptions.noise import ShotNoise
        shot = ShotNoise(severity_params=[photons])
        peers["medmnistc"] = lambda: shot.apply(image, severity=0)
    except ImportError: missing.add("medmnistc")
    try:
        import albumentations
        transform = albumentations.ShotNoise(scale_range=(1/photons, 1/photons), p=1)
        grey = image[...,None]
        peers["albumentations"] = lambda: transform(image=grey)["image"]
    except ImportError: missing.add("albumentations")
    return peers


def electronic_peers(image, s, missing):
    "Readout noise of severity s by every peer: name → function without arguments."
    sigma, rng = SIGMA0*s, np.random.default_rng(0)
    tensor, generator = torch.from_numpy(image), torch.Generator().manual_seed(0)
    def numpy_normal():
        noise = rng.standard_normal(image.shape, dtype=np.float32)
        return np.rint(np.clip(image + noise*np.float32(255*sigma), 0, 255)).astype(np.uint8)
    def torch_normal():
        noise = torch.randn(tensor.shape, generator=generator).mul_(255*sigma)
        return noise.add_(tensor).round_().clamp_(0, 255).to(torch.uint8)
    peers = {"numpy": numpy_normal, "torch": torch_normal}
    try:
        import cv2
        cv2.setNumThreads(1)
        noise = np.empty(image.shape, np.int16)
        def opencv():                                                     # 16-bit noise: its fastest way
            cv2.randn(noise, 0, 255*sigma)
            return cv2.add(image, noise, dtype=cv2.CV_8U)
        peers["opencv"] = opencv
    except ImportError: missing.add("opencv")
    try:
        from skimage.util import random_noise
        def skimage(): return np.rint(random_noise(image, mode="gaussian", var=sigma**2, rng=rng)*255).astype(np.uint8)
        peers["scikit-image"] = skimage
    except ImportError: missing.add("scikit-image")
    try:
        from medmnistc.corruptions.noise import GaussianNoise
        gauss = GaussianNoise(severity_params=[sigma])
        peers["medmnistc"] = lambda: gauss.apply(image, severity=0)
    except ImportError: missing.add("medmnistc")
    try:
        import albumentations
        transform = albumentations.GaussNoise(std_range=(sigma, sigma), p=1)
        grey = image[...,None]
        peers["albumentations"] = lambda: transform(image=grey)["image"]
    except ImportError: missing.add("albumentations")
    return peers


def mixed_peers(image, s, missing):
    "Photon, then readout noise, each of severity s: name → function without arguments."
    photons, sigma, rng = N0/s**2, SIGMA0*s, np.random.default_rng(0)
    tensor, generator = torch.from_numpy(image), torch.Generator().manual_seed(0)
    def numpy_both():
        noisy = rng.poisson(image*(photons/255))*(255/photons) + rng.normal(0, 255*sigma, image.shape)
        return np.rint(np.clip(noisy, 0, 255)).astype(np.uint8)
    def torch_both():
        noisy = torch.poisson(tensor.float().mul_(photons/255), generator=generator).mul_(255/photons)
        noisy.add_(torch.randn(tensor.shape, generator=generator), alpha=255*sigma)
        return noisy.round_().clamp_(0, 255).to(torch.uint8)
    return {"numpy": numpy_both, "torch": torch_both}


def methods(image, missing):
    "All there is to time: (noise, severity, method) → function without arguments."
    kinds = {"quantum":    (quantum_peers,    lambda s: Severity(s, 0)),
             "electronic": (electronic_peers, lambda s: Severity(0, s)),
             "mixed":      (mixed_peers,      lambda s: Severity(s, s))}
    jobs = {}
    for kind, (peers, severity) in kinds.items():
        for s in SEVERITIES:
            for name, f in peers(image, s, missing).items(): jobs[kind, s, name] = f
            jobs[kind, s, OURS] = partial(corrupt, image, severity(s), "benchmark", threads=1)
    out, words = np.empty_like(image), np.empty(image.size//_BLOCK*_BLOCK, np.uint32)
    jobs["limit", 0, "limit: copy of the image"]   = lambda: np.copyto(out, image)
    jobs["limit", 0, "limit: random words for it"] = lambda: philox_words(words)
    return jobs


def interleave(jobs, repeats):
    "Give every job one turn per round, in an order drawn anew; return the medians in milliseconds."
    times, order, rng = {key: [] for key in jobs}, list(jobs), np.random.default_rng(0)
    for f in jobs.values(): f()                                           # compile, fill tables
    for _ in range(repeats):
        for k in rng.permutation(len(order)):
            f = jobs[order[k]]
            f()
            start = time.thread_time(); f(); times[order[k]].append(time.thread_time() - start)
    return {key: float(np.median(t))*1e3 for key, t in times.items()}


def table_seconds():
    "Return the median and the largest time to compute the exact matrix of a condition, in ms."
    conditions, times = [*LADDER, *(Severity(q, e) for q in (.01, .1, .5, 2, 10) for e in (1e-4, .01, .5, 10))], []
    for s in conditions:
        once = []
        for _ in range(5):
            _channel_pmf.cache_clear()
            start = time.thread_time(); NoiseChannel(s).pmf; once.append(time.thread_time() - start)
        times.append(float(np.median(once))*1e3)
    return float(np.median(times)), max(times)


def batch_ratio(image, repeats):
    "How many times as fast a batch of 8 is in quantum noise of severity 4, by wall clock, all libraries with all cores."
    batch, photons, times = np.stack([image]*8), N0/16, {"ours": [], "numpy": [], "torch": []}
    rng, tensor = np.random.default_rng(0), torch.from_numpy(np.stack([image]*8))
    def numpy_batch(): np.rint(np.clip(rng.poisson(batch*(photons/255))*(255/photons), 0, 255)).astype(np.uint8)
    def torch_batch():
        counts = torch.poisson(tensor.float().mul_(photons/255))
        counts.mul_(255/photons).round_().clamp_(0, 255).to(torch.uint8)
    jobs = {"ours": lambda: corrupt(batch, Severity(4), range(8)), "numpy": numpy_batch, "torch": torch_batch}
    torch.set_num_threads(os.cpu_count())
    for _ in range(repeats):
        for name, f in jobs.items():
            f()                                         # one to warm up: another library's threads may still be spinning
            start = time.perf_counter(); f(); times[name].append(time.perf_counter() - start)
    ours, numpy_, torch_ = (float(np.median(t[1:])) for t in times.values())
    return ours*1e3, numpy_/ours, torch_/ours


def peak_memory(f):
    "Return the peak of what a call allocates, its result included, in MiB."
    f()
    tracemalloc.start(); result = f(); peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    return peak/2**20


def machine():
    "Name the processor, as far as the system tells."
    try: model = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration): model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def write(args, ms):
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["noise", "severity", "method", "ms", "size", "repeats", "machine"])
        for (kind, s, method), t in ms.items():
            rows.writerow([kind, s, method, f"{t:.4f}", args.size, args.repeats, machine()])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=512, help="pixels along one side of the radiograph")
    parser.add_argument("--repeats", type=int, default=30, help="rounds; the median over them is reported")
    parser.add_argument("--output", type=Path, help="write the medians to this CSV file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    image, missing = phantom(1, size=args.size).images[0], set()
    ms = interleave(methods(image, missing), args.repeats)

    versions = []
    for name in PACKAGES:
        try: versions.append(f"{name} {version(name)}")
        except PackageNotFoundError: missing.add(name)
    print(f"{machine()}; Python {platform.python_version()}; {', '.join(versions)}")
    if missing: print("not installed, left out:", ", ".join(sorted(missing)))
    print(f"{args.size}×{args.size} uint8, one thread, median of {args.repeats} interleaved rounds\n")
    print(f"{'noise':11}{'severity':>9}  {'method':28}{'ms':>8}{'ratio':>8}")
    ratios = {}
    for (kind, s, method), t in ms.items():
        ratio = t/ms[kind, s, OURS] if kind != "limit" else float("nan")
        if not method.startswith(OURS) and kind != "limit": ratios.setdefault(kind, {})[method, s] = ratio
        print(f"{kind:11}{s or '':>9}  {method:28}{t:8.3f}" + (f"{ratio:8.1f}" if ratio == ratio else ""))

    batch = np.stack([image]*8)
    ours = peak_memory(lambda: corrupt(batch, Severity(4), range(8)))
    rng = np.random.default_rng(0)
    theirs = peak_memory(lambda: np.rint(np.clip(rng.poisson(batch*(N0/255)), 0, 255)).astype(np.uint8))
    print(f"\nmemory for a batch of 8 ({batch.nbytes/2**20:.1f} MiB), beside its input: "
          f"{ours:.2f} MiB here, {theirs:.1f} MiB numpy")
    middle, most = table_seconds()
    print(f"exact matrix of a new severity: median {middle:.1f} ms, at most {most:.1f} ms")
    took, by_numpy, by_torch = batch_ratio(image, max(2, args.repeats//3))
    print(f"batch of 8, all cores, quantum noise of severity 4: {took:.2f} ms, "
          f"{by_numpy:.1f} times as fast as numpy, {by_torch:.1f} times as fast as torch")
    if args.output: write(args, ms)
    for kind in ("electronic", "mixed", "quantum"):
        r = ratios[kind]
        (method, severity), least = min(r.items(), key=lambda item: item[1])
        print(f"{kind} noise: smallest ratio {least:.1f} ({method}, severity {severity}), "
              f"median ratio {np.median(list(r.values())):.1f} over {len({m for m, _ in r})} peers")


if __name__ == "__main__": main()
