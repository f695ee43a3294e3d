"""Time every denoiser on noisy 8-bit radiographs: classical ones, and networks through torch and ONNX Runtime.

    python benchmarks/denoising.py [--sizes 256 512] [--batch 8] [--rounds 3] [--only nlm skidnet]
                                   [--output benchmarks/results/denoising.csv]

Every entry of `DENOISERS` and every network of `RESTORERS` (random weights, which cost what trained ones do) takes uint8
images, one at a time and in a batch, at s_q = 4 (the one condition that all denoisers take). Tables of the condition and
the export of a network are made before the clock starts. In every round all methods have one turn; the median over
rounds is reported, wall-clock, on an otherwise idle machine. "plain" is torch as a script has it, with weights and images
in torch's own order of memory; "torch" is ours, channels last. The last lines say how much faster ONNX Runtime in fp32 is
than either, plain torch last. Results are written only with `--output`.
"""
import argparse, copy, csv, time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cxr_noise_study.channel import corrupt
from cxr_noise_study.denoising import DENOISERS, denoise
from cxr_noise_study.evaluation import engine_model, predict
from cxr_noise_study.networks import build_model, processor
from cxr_noise_study.noise import Severity
from cxr_noise_study.phantom import phantom
from cxr_noise_study.protocol import RESTORERS

CONDITION = Severity(4)


def restored(model, images):
    "Run a network as the evaluation does, back to 8 bit."
    return np.rint(np.clip(predict(model, images)[:, 0], 0, 1)*255).astype(np.uint8)


def plainly(model, images):
    "Run a network as a script does."
    with torch.no_grad(): found = model(torch.from_numpy(images)[:, None].float()/255)
    return np.rint(found[:, 0].clamp(0, 1).numpy()*255).astype(np.uint8)


def methods(noisy, only):
    "All there is to time: (engine, name) → function: uint8 images → uint8 images."
    jobs = {("classical", name): partial(denoise, severity=CONDITION, name=name) for name in DENOISERS if name in only}
    for name in (name for name in RESTORERS if name in only):
        model = build_model(name, weights="none").eval()
        jobs["plain", name] = partial(plainly, copy.deepcopy(model).to(memory_format=torch.contiguous_format))
        jobs["torch", name] = partial(restored, model)
        jobs["onnx", name] = partial(restored, engine_model(model, "onnx", "fp32", noisy[:2]))
    return jobs


def measure(jobs, noisy, rounds):
    "Seconds of every job for one image, alone and in a batch: medians over interleaved rounds."
    times = {(*key, how): [] for key in jobs for how in ("single", "batch")}
    for f in jobs.values(): f(noisy[:1])                                  # tables and caches
    for _ in range(rounds):
        for key, f in jobs.items():
            for how, images in ("single", noisy[:1]), ("batch", noisy):
                start = time.perf_counter()
                f(images)
                times[*key, how].append((time.perf_counter() - start)/len(images))
    return {key: float(np.median(t)) for key, t in times.items()}


def main():
    known = [*DENOISERS, *RESTORERS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="pixels along one side")
    parser.add_argument("--batch", type=int, default=8, help="images of a batch")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the median over them is reported")
    parser.add_argument("--only", nargs="+", default=known, choices=known, metavar="NAME", help="some methods")
    parser.add_argument("--output", type=Path, help="write the medians to this CSV file")
    args = parser.parse_args()
    print(f"{processor()}, {torch.get_num_threads()} threads; ms for each image at (s_q, s_e) = ({CONDITION})")
    print(f"{'method':16}{'engine':11}{'size':>5}{'single':>10}{'batch':>10}")
    rows, ratios = [], {"torch": [], "plain": []}
    for size in args.sizes:
        noisy = corrupt(phantom(args.batch, size=size).images, CONDITION, range(args.batch))
        jobs = methods(noisy, args.only)
        found = measure(jobs, noisy, args.rounds)
        for engine, name in jobs:
            ms = [1e3*found[engine, name, how] for how in ("single", "batch")]
            print(f"{name:16}{engine:11}{size:5}{ms[0]:10.1f}{ms[1]:10.1f}", flush=True)
            rows.append([name, engine, size, *(f"{t:.2f}" for t in ms), args.batch, args.rounds, processor()])
            if engine == "onnx":
                for other in ratios: ratios[other] += [found[other, name, how]/found[engine, name, how] for how in ("single", "batch")]
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with open(args.output, "w", newline="", encoding="utf-8") as file:
            out = csv.writer(file, lineterminator="\n")
            out.writerow(["method", "engine", "size", "ms_single", "ms_batch", "batch", "rounds", "machine"])
            out.writerows(rows)
    for other, r in ratios.items():
        if r: print(f"{other}/onnx: median {np.median(r):.2f}, smallest {min(r):.2f}, largest {max(r):.2f}")


if __name__ == "__main__": main()
