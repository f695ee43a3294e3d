"Ensembles of what does not belong together, and of predictions at the edge."
import re

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from cxr_noise_study.ensembles import ENSEMBLES, Ensemble, align_members, ensemble_records, fit_fuzzy, fit_weights, mcnemar
from cxr_noise_study.statistics import compare_models, summarise
from tests.conftest import ROOT

RNG = np.random.default_rng(0)
TRUTH = np.arange(60) % 2


def member(score, conditions=("0,0",), findings=("Edema",), **about):
    "Records of one model."
    images = [f"i{k}" for k in range(len(score))]
    table = pd.DataFrame({"image_id": images, "patient_id": images, "replicate": 0, "y_true": TRUTH[:len(score)],
                          "y_score": score, "checkpoint": "best", **about})
    return pd.concat([table.assign(condition=c, finding=f) for c in conditions for f in findings], ignore_index=True)


@pytest.mark.parametrize("change, message", [
    (dict(dataset="covid"), "a and b differ in dataset: covid, nih"),
    (dict(test_set="covid"), "a and b differ in test_set"),
    (dict(task="Mass|Edema"), "a and b differ in task"),
    (dict(finding="Mass"), "have not predicted the same images, conditions and findings"),
    (dict(condition="0,1"), "have not predicted the same images, conditions and findings"),
    (dict(y_true=1), "have not predicted the same images, conditions and findings"),
], ids=str)
def test_runs_of_other_data_or_classes_are_refused(change, message):
    one = member(RNG.random(60), dataset="nih", task="Effusion|Edema")
    with pytest.raises(ValueError) as e: align_members({"a": one, "b": one.assign(**change)})
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("method", ENSEMBLES)
def test_certain_and_equal_predictions(method):
    "Probabilities of exactly 0 and 1, right and wrong, and two models that are the same."
    for scores in np.c_[TRUTH, TRUTH]*1., np.c_[TRUTH, 1 - TRUTH]*1., np.full((60, 2), .5), np.c_[RNG.random((2, 60))].T:
        parameters = ENSEMBLES[method].fit(scores, TRUTH)
        combined = ENSEMBLES[method].combine(scores, parameters)
        assert np.isfinite(parameters).all() and ((combined >= -1e-12) & (combined <= 1 + 1e-12)).all()


def test_weights_do_not_depend_on_the_order_of_models():
    scores = np.clip(TRUTH[:, None]*.4 + RNG.random((60, 3))*.6, .01, .99)
    for fit in fit_weights, fit_fuzzy:
        np.testing.assert_allclose(fit(scores[:, ::-1], TRUTH), fit(scores, TRUTH)[::-1], atol=2e-3)


def test_each_finding_is_fitted_by_itself():
    good, bad = np.clip(TRUTH*.8 + .1, 0, 1), np.clip(.9 - TRUTH*.8, 0, 1)
    a = pd.concat([member(good, findings=["Edema"]), member(bad, findings=["Mass"])])
    b = pd.concat([member(bad, findings=["Edema"]), member(good, findings=["Mass"])])
    made = ensemble_records({"a": a, "b": b}, {"a": a, "b": b})
    assert (abs(made.y_score - made.y_true) < .11).all()                    # each finding follows its good model


def test_records_of_an_ensemble_are_records():
    one, two = (member(np.clip(TRUTH*.3 + RNG.random(60)*.7, 0, 1), ("0,0", "0,4"), run=r, model=r) for r in "ab")
    made = ensemble_records({"a": one[one.condition == "0,0"], "b": two[two.condition == "0,0"]}, {"a": one, "b": two}, "average")
    assert {"auroc", "mcc", "kappa", "youden", "matched_sensitivity"} <= set(summarise(made, 50).metric)
    assert len(compare_models(made, one, "auroc"))


def test_an_ensemble_from_outside():
    ENSEMBLES.register(Ensemble("best_of", lambda s, y: np.array([s.shape[1]]), lambda s, _: s.max(1)))
    one, two = member(RNG.random(60)), member(RNG.random(60))
    try: made = ensemble_records({"a": one, "b": two}, {"a": one, "b": two}, "best_of")
    finally: del ENSEMBLES["best_of"]
    highest = np.maximum(one.y_score, two.y_score).set_axis(one.image_id)
    assert (made.set_index("image_id").y_score.sort_index() == highest.sort_index()).all()
    with pytest.raises(ValueError, match="ensemble 'best_of' is not one of average, slsqp, fuzzy"):
        ensemble_records({"a": one}, {"a": one}, "best_of")


def test_mcnemar_without_a_difference():
    right = RNG.random(40) < .7
    assert mcnemar(right, right) == 1 and mcnemar(right, ~right) <= 1


@pytest.fixture(scope="module")
def crossed():
    "AUROC of the committed classifiers, by scikit-learn: (start, pretext, seed) × condition; complete seeds."
    records = pd.read_parquet(ROOT/"data"/"findings"/"pretext_classifiers.parquet").query("checkpoint == 'best'")
    auroc = records.groupby(["start", "pretext", "seed", "condition"])[["y_true", "y_score"]].apply(
        lambda rows: roc_auc_score(rows.y_true, rows.y_score)).unstack("condition")
    cells = len(auroc.groupby(["start", "pretext"]))
    return records, auroc[auroc.groupby("seed")["0,0"].transform("size") == cells]


def test_16_8_the_answer_in_the_readme_follows_from_the_records(crossed):
    "The effects of either start, without noise and with it, the mean over tasks and seeds, without this package."
    records, auroc = crossed
    found = pd.DataFrame({"clean": auroc["0,0"], "noisy": auroc.drop(columns="0,0").mean(axis=1)})
    means = found.groupby(["start", "pretext"]).mean()
    changes = (means - means.xs("none", level="pretext").reindex(means.index, level="start")).drop("none", level="pretext")
    effect = changes.groupby("start").mean().loc[["random", "ImageNet"]].to_numpy().ravel()
    lines = (ROOT/"README.md").read_text(encoding="utf-8").splitlines()
    said = [line for line in lines if line.startswith("First learning to denoise or deblur")]
    assert len(said) == 1 and len(means) == 6
    printed = re.findall(r"\(([+-]\d\.\d{3}) \[([+-]\d\.\d{3}), ([+-]\d\.\d{3})\]", said[0])
    np.testing.assert_allclose([float(value) for value, *_ in printed], effect, atol=.00051)
    verbs = re.findall(r"raises|lowers|does not measurably change", said[0])
    want = ["raises" if float(low) > 0 else "lowers" if float(high) < 0 else "does not measurably change" for _, low, high in printed]
    assert verbs == want
    one = records[records.condition == "0,0"]
    seeds = auroc.index.unique("seed").size
    assert f"{one.image_id.nunique()} test radiographs of {one.patient_id.nunique()} children, {seeds} seed" in said[0]


def test_16_4_no_test_patient_is_seen_by_a_pretext_task(crossed):
    records, _ = crossed
    seen = pd.read_parquet(ROOT/"data"/"findings"/"pretext.parquet")
    tested, restored = (set(t.patient_id) for t in (records, seen))
    assert tested and tested <= restored                                    # the split of all tasks is one: test patients of both


def test_16_5_ensembles_of_the_committed_runs_are_fitted_on_other_children(crossed):
    records, _ = crossed
    validation = pd.read_parquet(ROOT/"data"/"findings"/"pretext_classifiers_validation.parquet")
    assert not set(validation.patient_id) & set(records.patient_id)
    assert set(validation.condition) == {"0,0"} and set(validation.run) == set(records.run)
