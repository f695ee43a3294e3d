"""Time an epoch over decoded radiographs: the image store against decoding every file in every epoch.

    python benchmarks/store.py [--size 256] [--repeats 5] [--output benchmarks/results/store.csv]

Where CXR_REAL_DATA names a folder with `nih/images`, its radiographs are used, else 400 phantoms written as PNG files of
512 pixels. An epoch reads every radiograph once, in an order drawn anew, as a float32 array of the given size in [0,1].
Three ways take turns in every round: the store, opened (its checksum verified) at the start of every epoch, as a run
does once; the store, open already; and Pillow, which decodes each PNG and resizes it with the same antialiased filter.
Building and decoding use a thread per core; the store's epoch has one thread, so that it gets no advantage. Also
printed: how long the build takes, and after how many epochs it has paid. Results are written only with `--output`.
"""
import argparse, csv, os, platform, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from cxr_noise_study.images import content, cores, decode_store, open_store, read_grey, square, to_grey8
from cxr_noise_study.phantom import phantom


def find_images(folder):
    "The files to read: name of the set, paths."
    if where := os.environ.get("CXR_REAL_DATA"):
        if found := sorted((Path(where)/"nih"/"images").glob("*.png")): return "ChestX-ray14", found
    made = phantom(40, size=512).images
    for i in range(400): Image.fromarray(np.roll(made[i % 40], i, 1)).save(folder/f"{i:03d}.png")
    return "phantoms", sorted(folder.glob("*.png"))


def build(files, size, cache):
    "Decode all files into a store and return its images."
    def decode(i):
        raw = read_grey(files[i])
        return to_grey8(square(raw, size), within=content(raw.shape, size)), raw.shape
    return decode_store({"benchmark": 1}, decode, (len(files), 0, size), Path("building"), cache_dir=cache)[0]["images"]


def pillow_epoch(files, order, size):
    "Decode and resize every file."
    def read(i):
        with Image.open(files[i]) as image:
            image = image.convert("L")
            if image.size != (size, size): image = image.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(image, np.float32).mean()/255
    with ThreadPoolExecutor(cores()) as pool: return sum(pool.map(read, order))


def store_epoch(images, order):
    "Read every row of an open store."
    return sum(images[i].astype(np.float32).mean()/255 for i in order)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=256); parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the table as CSV too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        name, files = find_images(Path(tmp))
        n, rng, cache = len(files), np.random.default_rng(0), Path(tmp)/"cache"
        start = time.perf_counter(); images = build(files, args.size, cache)
        building = time.perf_counter() - start
        [folder] = cache.glob("[!.]*")
        ways = {"Pillow, every epoch": lambda order: pillow_epoch(files, order, args.size),
                "store, opened each epoch": lambda order: store_epoch(open_store(folder)["images"], order),
                "store, open": lambda order: store_epoch(images, order)}
        seconds = {way: [] for way in ways}
        for _ in tqdm(range(args.repeats), desc="epochs", disable=None):
            for way in rng.permutation(list(ways)):
                order = rng.permutation(n).tolist(); start = time.perf_counter(); ways[way](order)
                seconds[way].append(time.perf_counter() - start)
    median = {way: float(np.median(taken)) for way, taken in seconds.items()}
    print(f"{n} radiographs ({name}), {args.size}×{args.size}, {cores()} cores, Pillow {PIL.__version__}, "
          f"{platform.processor() or platform.machine()}; medians of {args.repeats} epochs")
    print(f"{'build the store, once':28s} {building:8.3f} s   {1000*building/n:7.3f} ms an image")
    for way, taken in median.items(): print(f"{way:28s} {taken:8.3f} s   {1000*taken/n:7.3f} ms an image")
    pillow, opened = median["Pillow, every epoch"], median["store, opened each epoch"]
    print(f"the build has paid after {int(np.floor(building/(pillow - opened))) + 1} epochs")
    if args.output: write(args.output, {"build the store, once": building, **median}, f"{n} {name}", n, args.size)
    print(f"ratio: an epoch from the store, opened and verified, is {pillow/opened:.1f} times as fast as decoding")


def write(path, seconds, images, n, size):
    "Write the table as CSV."
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["what", "images", "size", "cores", "seconds", "ms_per_image"])
        for what, taken in seconds.items():
            writer.writerow([what, images, size, cores(), round(taken, 4), round(1000*taken/n, 4)])


if __name__ == "__main__": main()
