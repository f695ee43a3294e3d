"Summarise all records of the findings and all entries of the leaderboard, as JSON for the pages that draw them."
import json, math
from pathlib import Path

import pandas as pd

from cxr_noise_study.noise import Severity
from cxr_noise_study.results import of_archs, pools, read_numbers, read_runs, summarise_pool
from cxr_noise_study.statistics import summarise, with_condition
from cxr_noise_study.tasks import METRICS

DATA, FIGURES = (Path(__file__).parent.parent/name for name in ("data", "figures"))
FILTERS = {"file": "Records", "task": "Task", "arch": "Architecture", "train_noise": "Trained on",
           "test_set": "Test set", "denoiser": "Denoiser", "adapt": "Adaptation", "restorer": "Restorer",
           "further": "Further", "seed": "Seed"}                          # column → label
HIDDEN = ("run", "size")                                                  # tell models apart as well
KEYS = ("image_id", "patient_id", "condition", "structure", "finding", "output", "checkpoint", "setting", "data_hash")
ENTRY = {"model": "Model", "data": "Data set", "task": "Task", "denoiser": "Denoiser"}
RESAMPLES = 1000
START = ("study: segmentation", "figure: wingspan lungs protocol")      # shown first, where they are there
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


def model_columns(records):
    "The columns that tell models apart: those that name one, and texts that differ among records of one image."
    def differs(column): return records.groupby("image_id")[column].nunique().max() > 1
    texts = [column for column in records.select_dtypes(["object", "str", "category"]) if column not in KEYS]
    return [c for c in records if c in FILTERS or c in HIDDEN or c in texts and differs(c)]


def described(first, models, name):
    "What distinguishes a model, from one of its records, as texts; empty where records do not state it."
    further = [str(first[column]) for column in models if column not in FILTERS and column not in HIDDEN]
    return {key: str(first.get(key, "")) for key in FILTERS} | dict(file=name, further=", ".join(filter(None, further)))


def model_curves(records, name):
    "Summarise each model of a table of records."
    if "y_true" not in records and not set(METRICS) & set(records): raise ValueError("no column is one of METRICS")
    found, models = [], model_columns(records)
    for _, rows in records.groupby(models, sort=False, observed=True, dropna=False):
        summary = summarise(rows.dropna(axis=1, how="all"), resamples=RESAMPLES)
        found += curves_of(summary, **described(rows.iloc[0], models, name))
    return found


def study_curves(records, name):
    "Summarise each architecture of each pool, its seeds together."
    for external in (False, True):
        for pool in pools(records, external=external):
            for arch in pool["archs"]:
                one = of_archs(pool, {arch})
                first = next(iter(one["runs"].values())).iloc[0]
                words = {key: str(first.get(key, "")) for key in FILTERS}
                words |= dict(file=name, further=further_words(first), seed=", ".join(map(str, sorted(map(int, pool["seeds"])))))
                yield from curves_of(summarise_pool(one), **words)


def further_words(first):
    "How a model's training departs from what is usual, in words."
    usual = {"augment": ("flip", "affine"), "noise_input": (), "weights": ("packaged",), "size": ("128",)}
    return ", ".join(f"{key} {first[key]}" for key, values in usual.items() if str(first.get(key, "")) not in (*values, ""))


def findings():
    "Summarise each model of each file of records and of each collected study; return curves, and why a file has none."
    curves, left_out = [], {}
    for file in sorted((DATA/"findings").glob("*.parquet")):
        try: curves += model_curves(with_condition(pd.read_parquet(file)), file.stem.replace("_", " "))
        except (ValueError, KeyError) as e: left_out[file.name] = " ".join(str(e).split())[:120]
    for study in sorted(path.parent for path in (DATA/"findings").glob("*/runs.parquet")):
        records, notes = read_runs(study)
        left_out |= {f"{study.name}, {note.partition(' ')[0]}": note.partition(" ")[2] for note in notes}
        curves += study_curves(records, f"study: {study.name.replace('_', ' ')}")
    for file in sorted(FIGURES.glob("*.csv")):
        if "interval" not in pd.read_csv(file, nrows=1): continue
        for _, rows in read_numbers(file).groupby("model", sort=False):
            words = {key: str(rows[key].iloc[0]) if key in rows else "" for key in FILTERS}
            curves += curves_of(rows, **words | dict(file=f"figure: {file.stem.replace('_', ' ')}"))
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
