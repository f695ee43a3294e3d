"Summarise all records of the findings and all entries of the leaderboard, as JSON for the pages that draw them."
import json, math
from pathlib import Path

import pandas as pd

from cxr_noise_study.noise import Severity
from cxr_noise_study.results import read_numbers
from cxr_noise_study.statistics import summarise, with_condition
from cxr_noise_study.tasks import METRICS

DATA, FIGURES = (Path(__file__).parent.parent/name for name in ("data", "figures"))
FILTERS = {"file": "Records", "task": "Task", "arch": "Architecture", "train_noise": "Trained on",
           "test_set": "Test set", "denoiser": "Denoiser", "adapt": "Adaptation", "restorer": "Restorer",
           "seed": "Seed"}                                                # column → label
ENTRY = {"model": "Model", "data": "Data set", "task": "Task", "denoiser": "Denoiser"}
RESAMPLES = 1000
START = ("findings segmentation", "figure: wingspan lungs protocol")      # shown first, where they are there
CLEAN = str(Severity())


def condition_words(text):
    "A condition as the page shows it, and its sources."
    severity = Severity.parse(text)
    plain = severity.label.translate(str.maketrans("", "", "${}\\"))
    return dict(label=plain if text != CLEAN else "no noise", strengths=dict(severity.strengths))


def as_json(value): return None if isinstance(value, float) and not math.isfinite(value) else value


def curves_of(summary, **words):
    "Make one curve of each output and metric of a summary."
    for (output, metric), rows in summary.groupby(["output", "metric"], sort=False):
        numbers = rows.reindex(columns=["value", "low", "high", "floor"]).astype(float).round(5)
        points = {name: [*map(as_json, row)] for name, row in zip(rows.condition, numbers.itertuples(index=False))}
        methods = "; ".join(dict.fromkeys(rows.interval.fillna("").astype(str).str.partition("; of the change")[0]))
        yield words | dict(output=output, metric=metric, images=int(rows.images.iloc[0]),
                           patients=int(rows.patients.iloc[0]), interval=methods, points=points)


def described(rows, name):
    "What distinguishes rows of one model, as texts; empty where the records do not state it."
    first = rows.iloc[0]
    return {key: name if key == "file" else str(first.get(key, "")) for key in FILTERS}


def findings():
    "Summarise each model of each file of records; return curves, and files that hold none."
    curves, left_out = [], []
    for file in sorted((DATA/"findings").glob("*.parquet")):
        records = pd.read_parquet(file)
        if "task" not in records: left_out.append(file.name); continue
        records = with_condition(records)
        models = [name for name in (*FILTERS, "run", "dataset", "size") if name in records]
        for _, rows in records.groupby(models, sort=False, observed=True):
            summary = summarise(rows.dropna(axis=1, how="all"), resamples=RESAMPLES)
            curves += curves_of(summary, **described(rows, file.stem.replace("_", " ")))
    for file in sorted(FIGURES.glob("*.csv")):
        numbers = pd.read_csv(file, nrows=1)
        if "interval" not in numbers: continue
        for _, rows in read_numbers(file).groupby("model", sort=False):
            curves += curves_of(rows, **described(rows, f"figure: {file.stem.replace('_', ' ')}"))
    return curves, left_out


def leaderboard():
    "Read the entries of models, each written by `cxr-noise evaluate`."
    from cxr_noise_study.page import read_entry                           # here: it loads torch
    for file in sorted((DATA/"leaderboard").glob("*.json")):
        entry = read_entry(file)
        words = dict(model=entry["model"]["name"], data=entry["data"]["name"], task=entry["task"],
                     denoiser=entry["evaluation"]["denoiser"])
        yield entry, [*curves_of(pd.DataFrame(entry["results"]), **words)]


def script(curves, filters):
    "Write a script that leaves the curves in the page."
    texts = dict.fromkeys(text for curve in curves for text in curve["points"])
    def place(text): return len(strengths := Severity.parse(text).strengths), strengths
    order = sorted(texts, key=place)                                      # clean, one source at a time, several
    metrics = {name: dict(label=METRICS[name].label, higher=bool(METRICS[name].higher_is_better))
               for name in dict.fromkeys(curve["metric"] for curve in curves)}
    told = [dict(key=key, label=label) for key, label in filters.items() if any(curve[key] for curve in curves)]
    files = {curve.get("file") for curve in curves}
    start = [dict(file=name) for name in START if name in files] or [{}]
    conditions = {text: condition_words(text) for text in order}
    shown = dict(start=start[0], conditions=conditions, metrics=metrics, filters=told, curves=curves)
    return f"var shown = {json.dumps(shown, allow_nan=False, separators=(',', ':'))}"
