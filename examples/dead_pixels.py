"Add a noise source, a metric and a data set from outside the package: python examples/dead_pixels.py OUT_FOLDER"
import sys
from pathlib import Path
import numpy as np, pandas as pd, papermill
from PIL import Image
from cxr_noise_study.channel import corrupt
from cxr_noise_study.datasets import DATASETS, Dataset
from cxr_noise_study.evaluation import evaluate_robustness
from cxr_noise_study.noise import SOURCES, Severity, Source
from cxr_noise_study.phantom import phantom
from cxr_noise_study.tasks import METRICS, Metric

def kill(image, percent, rng): return np.where(rng.random(image.shape) < percent/100, 0., image)
def law(intensity, bounds, percent):        # P(value ≤ bound | intensity): makes the channel exact and fast
    return percent/100*(bounds >= 0) + (1 - percent/100)*(intensity[:, None] <= bounds)
SOURCES.register(Source("dead_pixels", stage=30, unit="percent of pixels that read 0", sample=kill, law=law))

def area_error(predicted, truth):           # (n, structures): |predicted - true| / true area
    true = truth.masks.sum((2, 3))
    return np.abs(predicted.sum((2, 3)) - true)/np.maximum(true, 1)
METRICS.register(Metric("area_error", label="relative error of the area", target="mask", function=area_error, best=0., worst=1.))

def manifest(folder):                       # one row per image: file, patient, mask
    names = [file.name for file in sorted(Path(folder).glob("*_image.png"))]
    return pd.DataFrame([dict(image=n, patient_id=n[:3], lungs=n.replace("image", "lungs")) for n in names])
DATASETS.register(Dataset("toy", manifest=manifest))

if __name__ == "__main__":
    out, nbs, made = Path(sys.argv[1]).resolve(), Path(__file__).resolve().parent.parent/"nbs", phantom(40, size=64)
    (out/"toy").mkdir(parents=True, exist_ok=True)
    for i in range(40):
        Image.fromarray(made.images[i]).save(out/"toy"/f"{i:03}_image.png"); Image.fromarray(made.lungs[i]*255).save(out/"toy"/f"{i:03}_lungs.png")
    print("share of zeros:", (corrupt(made.images, Severity(dead_pixels=20), image_ids=range(40)) == 0).mean().round(2))
    print(evaluate_robustness(lambda x: .45 - x, made.images, made.lungs, ["0,0", "dead_pixels=20"], output="logits", channels=1,
                              progress=False).groupby("condition").area_error.mean())
    run = dict(extend=__file__, dataset="toy", data_dir=str(out/"toy"), ladder="0,0 4,2 dead_pixels=20", train_noise="dead_pixels=0..30")
    papermill.execute_notebook(nbs/"04_sweep.ipynb", out/"sweep.ipynb", dict(run, size=64, epochs=1, runs_dir=str(out/"runs")))
    papermill.execute_notebook(nbs/"05_results.ipynb", out/"results.ipynb", dict(runs_dir=str(out/"runs")))
