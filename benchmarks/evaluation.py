"""Time a whole robustness grid, 14 conditions × 64 radiographs, the plain way and with `evaluate_robustness`.

    python benchmarks/evaluation.py [--images 64] [--rounds 1] [--only UNet] [--output benchmarks/results/evaluation.csv]

The plain way is what a study without this package writes: for each condition, decode the PNG files, add noise with
NumPy, run the network in PyTorch (eager, fp32), score with MONAI or scikit-learn. Ours takes the same files and the
same network; `engine` says who runs it. Both compute the same metrics: for masks with Dice and IoU alone and with
surface Dice and HD95 too; for labels the probabilities that AUROC needs. The files have the network's size, or 1024
px, as ChestX-ray14 delivers them, to be resized by both sides; the plain way reads them for each condition. Times are
wall-clock on an otherwise idle machine, decoding and, for other engines than torch, the export of the network
included; the export alone is given beside it. The noise fields differ (NumPy's stream against the keyed one), so the
plain way's numbers are compared by their means; engines are compared image by image with our own fp32 run, whose
fields they share.
bf16 is timed on every
processor: whether it is faster there only a measurement tells, and the last lines say what `auto` would choose. Results
are written only with `--output`.
"""
import argparse, copy, csv, tempfile, time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from PIL import Image

from cxr_noise_study.evaluation import ENGINES, choose_engine, engine_model, evaluate_robustness
from cxr_noise_study.networks import build_model, processor
from cxr_noise_study.noise import LADDER, N0, SIGMA0
from cxr_noise_study.phantom import phantom
from cxr_noise_study.tasks import FIELD_OF_VIEW

BATCH = 8


def plain_noise(image, severity, rng):
    "Quantum, then electronic noise, in floats, back to 8 bit."
    x = image/255
    if severity.s_q:
        photons = N0/severity.s_q**2
        x = rng.poisson(x*photons)/photons
    if severity.s_e: x = x + rng.normal(0, SIGMA0*severity.s_e, x.shape)
    return np.rint(np.clip(x, 0, 1)*255).astype(np.uint8)


def read(file, size):
    image = Image.open(file)
    return np.asarray(image if image.width == size else image.resize((size, size), Image.Resampling.BILINEAR))


@torch.inference_mode()
def plain(model, files, size, masks, surface):
    "One condition after the other; mean Dice, or mean probability, by condition."
    rng, means = np.random.default_rng(0), []
    for severity in LADDER:
        values = []
        for k in range(0, len(files), BATCH):
            images = [read(f, size) for f in files[k:k + BATCH]]
            noisy = np.stack([plain_noise(i, severity, rng) for i in images])
            logits = model(torch.from_numpy(noisy)[:, None].float()/255)
            if masks is None: values += logits.sigmoid()[:, 0].tolist(); continue
            said, true = (logits > 0).float(), torch.from_numpy(masks[k:k + BATCH])[:, None].float()
            both, areas = (said*true).sum((2, 3)), said.sum((2, 3)) + true.sum((2, 3))
            values += torch.where(areas > 0, 2*both/areas, 1.)[:, 0].tolist()
            torch.where(areas > 0, both/(areas - both), 1.)
            if surface:
                compute_surface_dice(said, true, [2*size/FIELD_OF_VIEW], include_background=True)
                compute_hausdorff_distance(said, true, include_background=True, percentile=95)
        means.append(np.mean(values))
    return np.array(means)


def ours(model, files, size, masks, surface, engine, precision):
    "The records of the same grid."
    images = np.stack([read(f, size) for f in files])
    targets = np.zeros(len(files), int) if masks is None else masks
    metrics = ["dice", "iou", *["nsd", "hd95"]*surface] if masks is not None else ["brier"]
    return evaluate_robustness(model, images, targets, output="logits", channels=1, batch_size=BATCH, engine=engine,
                               precision=precision, metrics=metrics, device="cpu", progress=False, name="benchmark")


def by_condition(records, column):
    return records.pivot_table(column, "condition", "image_id").loc[[*map(str, LADDER)]]


def clock(f):
    start = time.perf_counter(); value = f()
    return value, time.perf_counter() - start


def trained(images, masks):
    "A UNet after 12 steps on the phantoms, so that its masks and hence its Dice are not those of random weights."
    model = build_model("unet", "resnet34", "none", 1)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(12):
        rows = np.arange(8*step, 8*step + 8) % len(images)
        x, y = torch.from_numpy(images[rows])[:, None].float()/255, torch.from_numpy(masks[rows])[:, None].float()
        p = model(x).sigmoid(); loss = 1 - (2*(p*y).sum((2, 3))/((p + y).sum((2, 3)) + 1)).mean()
        optimiser.zero_grad(); loss.backward(); optimiser.step()
    return model.eval()


SIDE, ONE = 1024, [("onnx", "fp32")]    # pixels of a delivered file; engine of the further grids
GRIDS = {False: [("", False, False, None), (f" from {SIDE} px", False, True, ONE)],   # name, surfaces, large files,
         True:  [(", Dice and IoU", False, False, None), (", with surfaces", True, False, ONE)]}  # engines (None: all)


def report(what, column, seconds, found, export):
    "Print a grid's lines and return its rows."
    median = {key: float(np.median(t)) for key, t in seconds.items()}
    base, rows = median.pop(("plain", "fp32")), []
    rows.append(dict(grid=what, engine="plain", precision="fp32", seconds=base))
    print(f"{what}: plain way {base:.1f} s", flush=True)
    for (engine, precision), t in median.items():
        once = 0. if engine == "torch" else export(engine, precision)
        r = dict(grid=what, engine=engine, precision=precision, seconds=t, export=once, ratio=base/t,
                 ratio_without_export=base/(t - once), **found[engine, precision])
        print(f"    {engine:9s}{precision}: {t:6.1f} s, {once:.1f} of them export; {r['ratio']:.2f}× "
              f"({r['ratio_without_export']:.2f}× without the export); {column} off torch fp32 by {r['off_mean']:.1e} "
              f"(mean of a condition), {r['off_image']:.1e} (image); off the plain way by {r['off_plain']:.3f}",
              flush=True)
        rows.append(r)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64); parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the medians to this CSV file")
    parser.add_argument("--only", default="", help="part of the name of a grid; lines of other grids stay in the file")
    given = parser.parse_args()
    amx, rows, chosen_here = torch.cpu._is_amx_tile_supported(), [], {}
    engines = [(name, p) for name, (package, precisions) in ENGINES.items() if find_spec(package) for p in precisions]
    with tempfile.TemporaryDirectory() as folder:
        for name, size in (("UNet ResNet34", 256), ("EfficientNet-b0", 224)):
            made = phantom(given.images, size=size); masks = made.lungs if "UNet" in name else None
            files = {side: [Path(folder)/f"{size}-{side}-{k}.png" for k in range(given.images)]
                     for side in (size, SIDE)}
            for side, paths in files.items():
                for f, image in zip(paths, made.images):
                    Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC).save(f)
            if masks is None: model = build_model("efficientnet_b0", weights="none").eval()
            else:             model = trained(made.images, made.lungs)
            eager = copy.deepcopy(model).to(memory_format=torch.contiguous_format).eval()  # as anybody would have it
            choice = choose_engine(model, made.images[:2], given.images*len(LADDER), device="cpu")
            chosen_here[f"{name} {size}"] = choice
            column, reference = ("y_score" if masks is None else "dice"), None
            for what, surface, large, chosen in GRIDS[masks is not None]:
                what, seconds, found = f"{name} {size}{what}", {}, {}
                if given.only not in what: continue
                grid, reference = (files[SIDE if large else size], size, masks, surface), None if large else reference
                for _ in range(given.rounds):
                    means, t = clock(lambda: plain(eager, *grid))
                    seconds.setdefault(("plain", "fp32"), []).append(t)
                    for engine, precision in engines if chosen is None else chosen:
                        try: records, t = clock(lambda: ours(model, *grid, engine, precision))
                        except ArithmeticError as e: print(f"{what}: left out, {e}"); continue
                        seconds.setdefault((engine, precision), []).append(t)
                        table = by_condition(records, column)
                        if reference is None:
                            reference = table if engine == "torch" else \
                                by_condition(ours(model, *grid, "torch", "fp32"), column)
                        by_mean = table.mean(axis=1)
                        found[engine, precision] = dict(
                            off_image=np.abs(table - reference).to_numpy().max(),
                            off_mean=np.abs(by_mean - reference.mean(axis=1)).max(),
                            off_plain=np.abs(by_mean.to_numpy() - means).max())
                rows += report(what, column, seconds, found, lambda e, p: clock(
                    lambda: engine_model(model, e, p, made.images[:2], threads=1))[1])
    if given.output: write(given, rows, amx)
    for what, choice in chosen_here.items(): print(f"{what}: auto takes {choice.engine} in {choice.precision}")
    for r in rows:
        if r["engine"] == "onnx": print(f"{r['grid']}: {r['ratio']:.2f}× with ONNX Runtime fp32")
    for grid in dict.fromkeys(r["grid"] for r in rows):
        best = max((r for r in rows if r["grid"] == grid and "ratio" in r), key=lambda r: r["ratio"])
        print(f"{grid}: {best['ratio']:.2f}× with {best['engine']} {best['precision']}, the fastest here")


def write(given, rows, amx):
    "Write the medians; lines of grids that were not timed stay in the file."
    given.output.parent.mkdir(parents=True, exist_ok=True)
    before = list(csv.DictReader(open(given.output, newline=""))) if given.only and given.output.exists() else []
    kept = [r for r in before if given.only not in r["grid"]]
    about = dict(cpu=processor(), threads=torch.get_num_threads(), amx=amx, images=given.images,
                 torch=torch.__version__)
    with open(given.output, "w", newline="") as f:
        names = ["grid", "engine", "precision", "seconds", "export", "ratio", "ratio_without_export", "off_mean",
                 "off_image", "off_plain", *about]
        writer = csv.DictWriter(f, names, lineterminator="\n"); writer.writeheader()
        for r in kept: writer.writerow(r)
        for r in rows: writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in (r | about).items()})


if __name__ == "__main__": main()
