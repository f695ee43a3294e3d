"Attacks on tasks and statistics: old records, unknown sources, threads, brute force."
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from cxr_noise_study.statistics import (INTERVAL, compare_models, exchange_test, mean_test, noise_paths,
                                        recoverable_fraction, severity_path, show_curve, study_weights, summarise)
from cxr_noise_study.tasks import METRICS, TASKS, Metric, Truth, check_tolerance, find_task, own_task

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
    with pytest.raises(ValueError, match="'fog' has no path"): severity_path(summary.set_index("condition").T, "fog")


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
    threshold = np.repeat([.5, .3], 8)
    def score(weights): return METRICS["f1"].function(np.tile(y, 2), np.r_[a, b], weights, threshold)
    assert np.isclose(exchange_test(score, who), np.mean(every >= every[0] - 1e-12))


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


def masks(dice, condition="0,0", **columns):
    n = len(dice)
    who = {"image_id": [f"i{k:03d}" for k in range(n)], "patient_id": [f"p{k:03d}" for k in range(n)]}
    return pd.DataFrame({**who, "condition": condition, "replicate": 0, "structure": "lungs", "dice": dice} | columns)


def perfect(n, positives):
    y = np.arange(n) < positives
    return pd.DataFrame({"image_id": [f"i{k:03d}" for k in range(n)], "patient_id": [f"p{k:03d}" for k in range(n)],
                         "condition": "0,0", "replicate": 0, "finding": "Edema", "y_true": y*1, "y_score": .2 + .6*y})


def test_14_8_an_interval_never_has_zero_width():
    "All patients agree: the bound is what 5 % of samples of this size would miss, 3/n for many patients."
    row = summarise(masks(np.ones(40)), resamples=99).iloc[0]
    assert np.isclose(row.low, .05**(1/40)) and row.high == 1 and abs(1 - row.low - 3/40) < .005
    none = summarise(masks(np.zeros(40)), resamples=99).iloc[0]
    assert none.low == 0 and np.isclose(none.high, 1 - .05**(1/40))
    few = summarise(perfect(100, 8), resamples=99).set_index("metric").loc["auroc"]
    assert np.isclose(few.low, .05**(1/8)) and few.high == 1                   # the rarer class counts, not 100


def test_14_8_the_interval_of_an_auroc_lies_within_0_and_1_and_holds_the_truth_at_ten_percent_positives():
    "AUROC .95, 10 of 100 positive: percentile intervals held the truth in 84 of 100 studies."
    g, held, within = np.random.default_rng(5), 0, True
    for k in range(300):
        y = np.arange(100) < 10
        score = 1/(1 + np.exp(-(y*2**.5*1.6448536 + g.normal(size=100))))
        records = perfect(100, 10).assign(y_score=score)
        row = summarise(records, resamples=300, seed=k).set_index("metric").loc["auroc"]
        held, within = held + (row.low <= .95 <= row.high), within and 0 <= row.low <= row.high <= 1
    assert within and held >= .915*300, held                                    # 94 %, less 1.8 standard errors


def test_14_8_a_summary_names_its_method():
    assert set(summarise(masks(np.linspace(.8, .9, 9)), resamples=9).interval) == {INTERVAL}


def matched(clean, noisy, back):
    return pd.concat([masks(clean), masks(noisy, "0,10")]), masks(back, "0,10")


def test_14_9_where_noise_helps_the_fraction_says_so():
    g = np.random.default_rng(0)
    base = .8 + .02*g.normal(size=40)
    found = recoverable_fraction(*matched(base, base + .05, base + .06), "0,10", "dice")
    assert found["note"] == "undefined: noise helps" and np.isnan(found["fraction"]) and found["drop_high"] < 0


def test_14_9_a_small_drop_is_marked_unstable():
    g = np.random.default_rng(1)
    base, change = .8 + .02*g.normal(size=40), .05*g.normal(size=40)
    small = base - 3*change.std()/40**.5 + change - change.mean()               # a drop of three standard errors
    found = recoverable_fraction(*matched(base, small, base - .01), "0,10", "dice")
    assert found["note"].startswith("unstable") and np.isfinite(found["fraction"])
    large = recoverable_fraction(*matched(base, small - .2, base - .01), "0,10", "dice")
    assert large["note"] == ""


def test_14_9_a_drop_of_a_distance_is_a_rise():
    g = np.random.default_rng(2)
    base = 5 + g.random(30)
    clean, noisy, back = (masks(base, c).drop(columns="dice").assign(hd95=base + d)
                          for c, d in (("0,0", 0), ("0,10", 4), ("0,10", 1)))
    found = recoverable_fraction(pd.concat([clean, noisy]), back, "0,10", "hd95")
    assert np.isclose(found["drop"], 4) and np.isclose(found["fraction"], .75) and found["note"] == ""


def test_14_9_the_test_of_the_mean_stands_beside_the_one_of_exchangeability():
    "Most patients gain a little, a few lose much: not exchangeable, and the same on average."
    gain = np.r_[np.full(76, .01), np.full(4, -.19)]
    a, b = masks(.8 + gain), masks(np.full(80, .8))
    found = compare_models(a, b, "dice").iloc[0]
    assert abs(found.difference) < 1e-12 and found.p_mean > .5
    skewed = np.random.default_rng(3).permutation(gain + .02)
    assert mean_test(skewed, np.arange(80)) < .05                               # their mean is .02


def test_14_9_a_tolerance_below_a_pixel_warns():
    target = np.zeros((1, 1, 64, 64), np.uint8)
    target[..., 20:40, 20:40] = 1
    check_tolerance.cache_clear()                                               # it warns once for each size
    with pytest.warns(UserWarning, match="tolerance of 2 mm is below a pixel of 5.60 mm"):
        own_task(target.shape).score(target, Truth(target), "probabilities")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own_task(target.shape).score(target, Truth(target, mm_per_pixel=1.), "probabilities")
        own_task(target.shape).score(target, Truth(target), "probabilities", ["dice"])
