"""Time training: this package against a plain fastai DataBlock that decodes PNGs, on the same files, one network.

    python benchmarks/training.py [--images 80] [--size 256] [--epochs 6] [--encoder efficientnet_lite0] [--output FILE]

Both sides train the same UNet from the same weights on 512 px PNG files of radiographs and lung masks, flipped at
random, with AdamW at a constant rate and soft Dice, for the same number of epochs. The plain side is what a fastai user
writes first: a DataBlock of images and masks, resized as they are decoded, three channels, fp32, fastai's own number of
workers. Ours reads the decoded store, runs channels-last, and in bf16 where a probe on this machine finds it clearly
faster, as precision "auto" does. The sides take turns, epoch by epoch, so that a change in the machine's speed meets
both; an epoch's time includes its validation, and the first epoch of each side is left aside. A last part times the
noise of training against the step that it is made for. Radiographs are phantoms, or those of CXR_REAL_DATA/wingspan
where that is set. Results are written only with `--output`.
"""
import argparse, csv, os, statistics, tempfile, time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.vision.all import DataBlock, FlipItem, ImageBlock, IndexSplitter, Learner, MaskBlock, OptimWrapper, Resize
from monai.losses import DiceLoss
from PIL import Image
from cxr_noise_study.datasets import load_radiographs
from cxr_noise_study.networks import build_model, processor
from cxr_noise_study.phantom import phantom
from cxr_noise_study.training import RadiographLoader, choose_precision, make_learner


def write_phantoms(root, n):
    "Write phantoms as a user has radiographs: PNG files and a manifest."
    made, rows = phantom(n, size=512), []
    for kind in ("images", "lungs"): (root/kind).mkdir()
    for i in range(n):
        for kind, array in ("images", made.images[i]), ("lungs", made.lungs[i]*255):
            Image.fromarray(array).save(root/kind/f"{i:03d}.png")
        rows.append(dict(image=f"images/{i:03d}.png", patient_id=f"p{i}", lungs=f"lungs/{i:03d}.png"))
    pd.DataFrame(rows).to_csv(root/"manifest.csv", index=False)


def plain_learner(root, data, model, size, batch_size, lr):
    "What a fastai user writes first."
    lungs = pd.read_csv(root/"manifest.csv").set_index("image").lungs
    names = data.table[data.table["split"] != "test"].image_id.tolist()
    valid = [i for i, s in enumerate(data.table[data.table["split"] != "test"]["split"]) if s == "valid"]
    def mask(name): return (np.asarray(Image.open(root/lungs[name]).convert("L")) > 0).astype(np.uint8)
    block = DataBlock((ImageBlock, MaskBlock), get_x=lambda name: root/name, get_y=mask, splitter=IndexSplitter(valid),
                      item_tfms=Resize(size, method="squish"), batch_tfms=FlipItem())
    loaders = block.dataloaders(names, bs=batch_size)
    loss = DiceLoss(sigmoid=True)
    return Learner(loaders, model, lambda p, y: loss(p, y[:, None].float()), lr=lr, wd=.01,
                   opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))


def dice_of(learner, ours):
    "Dice of each validation image."
    scores = []
    learner.model.eval()
    with torch.inference_mode():
        for x, y in learner.dls.valid:
            x, y = (t.as_subclass(torch.Tensor) for t in (x, y))
            predicted, true = learner.model(x) > 0, (y if ours else y[:, None]) > 0
            scores += (2*(predicted & true).sum((1, 2, 3))/(predicted.sum((1, 2, 3)) + true.sum((1, 2, 3)))).tolist()
    return np.array(scores)


def noise_share(data, batch_size, seconds_per_step):
    "Milliseconds that each regime of training noise adds to a batch, and its share of a step."
    rows = []
    for regime in "clean", "0,10", "ladder", "0..10,0", "0..10,0..10":
        loader = RadiographLoader(data, data.where("train"), bs=batch_size, train=True, noise=regime)
        for _ in loader: pass
        took = [(time.perf_counter(), sum(1 for _ in loader), time.perf_counter()) for _ in range(5)]
        rows.append([regime, statistics.median(1e3*(end - begin)/n for begin, n, end in took)])
    return [[regime, ms - rows[0][1], (ms - rows[0][1])/(1e3*seconds_per_step)] for regime, ms in rows[1:]]


def write_results(output, rows, about):
    "Write the table as CSV."
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["what", "seconds", "dice_or_share", "low", "high", *about])
        for row in rows:
            writer.writerow([f"{v:.5g}" if isinstance(v, float) else v for v in row] + list(about.values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, kind, default in (("--images", int, 80), ("--size", int, 256), ("--epochs", int, 6), ("--batch", int, 8),
                                ("--lr", float, 1e-3), ("--encoder", str, "efficientnet_lite0"),
                                ("--output", Path, None)):
        parser.add_argument(name, type=kind, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        if real := os.environ.get("CXR_REAL_DATA"): root = Path(real)/"wingspan"
        else: write_phantoms(root, args.images)
        data = load_radiographs("folder", "lungs", root, args.size, cache_dir=Path(tmp)/"cache")
        precision = choose_precision("cpu", "unet", args.encoder, args.size, args.batch)["precision"]
        print(f"{torch.get_num_threads()} threads, {len(data.where('train'))} training and "
              f"{len(data.where('valid'))} validation radiographs of {data.name if real else 'phantoms'}; ours in {precision}")
        weights = "packaged" if args.encoder == "efficientnet_lite0" else "none"
        models = [build_model("unet", args.encoder, weights) for _ in range(2)]
        plain = models[1].net.to(memory_format=torch.contiguous_format)
        learners = {"ours": make_learner(models[0], data, args.batch, args.lr, precision=precision, device="cpu"),
                    "plain fastai": plain_learner(root, data, plain, args.size, args.batch, args.lr)}
        seconds = {name: [] for name in learners}
        for epoch in range(args.epochs):
            for name, learner in sorted(learners.items(), reverse=epoch % 2):
                start = time.perf_counter()
                with learner.no_bar(), learner.no_logging(): learner.fit(1)
                seconds[name].append(time.perf_counter() - start)
        scores = [dice_of(learner, name == "ours") for name, learner in learners.items()]
        medians = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
        rows = []
        for (name, median), dice in zip(medians.items(), scores):
            half = 1.96*dice.std(ddof=1)/len(dice)**.5
            rows.append([name, median, dice.mean(), dice.mean() - half, dice.mean() + half])
            print(f"{name:14s} {median:7.2f} s an epoch   validation Dice {dice.mean():.3f} ± {half:.3f} (95 %)")
        steps = len(data.where("train"))//args.batch
        for regime, ms, share in noise_share(data, args.batch, medians["ours"]/steps):
            print(f"training noise {regime:12s} {ms:6.2f} ms a batch, {share:.1%} of a step")
            rows.append([f"noise {regime}", ms/1e3, share, "", ""])
        ratio = medians["plain fastai"]/medians["ours"]
        about = dict(data=data.name if real else "phantoms", images=len(data.where("train")), size=args.size,
                     encoder=args.encoder, epochs=args.epochs, precision=precision,
                     processor=processor(), threads=torch.get_num_threads(), torch=torch.__version__)
        if args.output: write_results(args.output, [*rows, ["ratio", ratio, "", "", ""]], about)
    print(f"plain fastai takes {ratio:.2f} times as long as ours ({precision})")


if __name__ == "__main__": main()
