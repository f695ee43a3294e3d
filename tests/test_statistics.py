"Attacks on tasks and statistics: old records, unknown sources, threads, brute force."
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from cxr_noise_study.statistics import compare_models, noise_paths, show_curve, step_test, summarise, swap_test
from cxr_noise_study.tasks import METRICS, TASKS, Metric, Truth, find_task

CONDITIONS = ((0., 0.), (0., 4.), (4., 0.), (4., 2.))


def labels(seed=0, n=40):
    "Records of a pair of findings as versions before conditions wrote them."
    g = np.random.default_rng(seed)
    y = np.arange(n) % 2
    return pd.concat([pd.DataFrame({
        "run": "a", "dataset": "nih", "task": "Effusion|Edema", "s_q": s_q, "s_e": s_e, "replicate": 0,
        "image_id": [f"i{k:02d}" for k in range(n)], "patient_id": [f"p{k // 2:02d}" for k in range(n)],
        "y_true": y, "y_score": 1/(1 + np.exp(-y + g.normal(size=n))), "threshold": .5}) for s_q, s_e in CONDITIONS])


def test_old_records_give_the_same_summary_as_new_ones():
    old = labels()
    new = old.assign(condition=[f"{q:g},{e:g}" for q, e in zip(old.s_q, old.s_e)], finding="Edema", test_set="nih")
    pd.testing.assert_frame_equal(summarise(old, resamples=50), summarise(new, resamples=50))
    assert summarise(old, resamples=50).condition.unique().tolist() == ["0,0", "0,4", "4,0", "4,2"]
    assert set(summarise(old, resamples=50).output) == {"Edema"}


def test_a_source_that_is_not_registered_is_summarised_last_and_has_no_path():
    records = labels().assign(condition="0,0")
    records["condition"] = np.repeat(["0,0", "fog=3", "4,0", "ash=1"], 40)
    summary = summarise(records, resamples=20)
    assert summary.condition.unique().tolist() == ["0,0", "4,0", "ash=1", "fog=3"]
    assert list(noise_paths(summary.condition)) == ["quantum"]
    with pytest.raises(ValueError, match="'fog' has no path"): step_test(records, "brier", "fog", 3.)


@pytest.mark.parametrize("column", ["run", "model", "dataset", "test_set"])
def test_pools_of_runs_models_and_data_sets_are_refused(column):
    both = pd.concat([labels(0).assign(**{column: "a"}), labels(1).assign(**{column: "b"})])
    with pytest.raises(ValueError, match=f"{column}: a, b"): summarise(both)
    with pytest.raises(ValueError, match=f"{column}: a, b"): compare_models(both, labels(), "auroc")


def test_swaps_of_a_metric_with_a_threshold_against_all_patterns():
    y, who = np.array([1, 0, 1, 0, 1, 1, 0, 0]), np.repeat(np.arange(4), 2)
    a, b = np.array([.9, .2, .6, .7, .8, .4, .1, .3]), np.array([.3, .6, .7, .2, .4, .1, .9, .6])
    def decided(swap):                          # a score keeps the threshold of its model
        first, second = np.where(swap, b >= .3, a >= .5), np.where(swap, a >= .5, b >= .3)
        return abs(f1_score(y, first) - f1_score(y, second))
    every = np.array([decided(np.array(s)[who]) for s in product((False, True), repeat=4)])
    share = np.mean(every >= every[0] - 1e-12)
    assert abs(swap_test(y, a, b, who, "f1", (.5, .3), permutations=9999) - share) < .025       # 5 standard errors


def test_a_source_and_metrics_from_outside_reach_summary_and_figure():
    from cxr_noise_study.noise import SOURCES, Source
    import matplotlib.pyplot as plt
    SOURCES.register(Source("toy_rain", 30, "drops", lambda image, s, rng: image))
    METRICS.register(Metric("toy_error", "absolute error", "label", lambda y, score: abs(y - score), best=0, worst=1))
    try:
        records = labels()
        records["condition"] = np.repeat(["0,0", "toy_rain=1", "toy_rain=3", "quantum=1,toy_rain=1"], 40)
        summary = summarise(records.drop(columns=["s_q", "s_e"]), resamples=20)
        rows = summary[summary.metric == "toy_error"].set_index("condition")
        clean = records[records.condition == "0,0"]
        assert np.isclose(rows.value["0,0"], abs(clean.y_true - clean.y_score).mean()) and rows.floor["0,0"] == .5
        figure, axes = plt.subplots(1, 1, squeeze=False)
        ax = show_curve(summary, "toy_error", axes[0])[0]
        assert "toy rain" in ax.get_xlabel() and len(ax.get_lines()[0].get_xdata()) == 3
        plt.close(figure)
    finally: del SOURCES["toy_rain"], METRICS["toy_error"]


def test_threads_that_share_a_truth_score_as_one_does():
    g = np.random.default_rng(0)
    masks, task = (g.random((4, 2, 32, 32)) < .3).astype(np.uint8), TASKS["lungs_heart"]
    outputs = [g.normal(size=masks.shape) for _ in range(12)]
    expected = [task.score(o, Truth(masks)) for o in outputs]
    truth = Truth(masks)
    with ThreadPoolExecutor(4) as pool: found = list(pool.map(lambda o: task.score(o, truth), outputs))
    for a, b in zip(expected, found): pd.testing.assert_frame_equal(a, b)


def test_a_metric_is_never_taken_from_an_array_that_has_changed():
    masks = np.ones((1, 1, 8, 8), bool)
    predicted, truth = masks.copy(), Truth(masks)
    assert METRICS["dice"].function(predicted, truth) == 1
    predicted[..., :4] = False
    assert np.isclose(METRICS["dice"].function(predicted, truth), 2/3)
    assert METRICS["nsd"].function(predicted, truth) < 1


@pytest.mark.parametrize("text", ["", "|", "lung", "A|a|b", "A| ", "Lungs"])
def test_what_is_no_task_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match="is not one of lungs, heart, lungs_heart") as e: find_task(text)
    assert "\n" not in str(e.value)
