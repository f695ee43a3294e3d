"What no notebook can hold: the report of nothing, of damaged runs and of hostile names, executed as `make report` does."
import json, re, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from cxr_noise_study.images import file_digest
from cxr_noise_study.claims import (MARGIN, bound_verdict, claim_pools, claims_table, fragile, judge_claims, number_verdict,
                                    units_of)
from cxr_noise_study.report import report_page
from cxr_noise_study.results import (draw_figures, glance, headline, main_metric, matched_pairs, of_archs, pools, read_runs,
                                     results_figure, save_numbers, summarise_pools, summarise_runs, worst_condition)
from cxr_noise_study.statistics import INTERVAL, summarise
from tests.conftest import ROOT

HOSTILE = "<img src=x onerror=alert(1)>"


def report(tmp_path, runs_dir):
    "Execute 05_results as `make report` does; return the page's HTML."
    command = [Path(sys.executable).parent/"papermill", "--no-progress-bar", "--cwd", ROOT/"nbs", ROOT/"nbs"/"05_results.ipynb",
               tmp_path/"results.ipynb", "-p", "runs_dir", runs_dir]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return report_page(tmp_path/"results.ipynb", tmp_path/"report.html").read_text()


def outside(page): return re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?!data:)[^"]*"', page)


def made_run(runs, name, n=12, drop=.4, parameters=None, **columns):
    "Write a run as 04_sweep leaves it, without training anything."
    rng, rows = np.random.default_rng(0), []
    conditions = columns.pop("conditions", ("0,0", "0,6", "0,8", "0,10", "10,0"))
    who = dict(run=name, dataset="made", test_set="made", task="lungs", arch="unet", encoder="e", weights="none", train_noise="clean",
               seed=0, checkpoint="best", replicate=0) | columns
    for condition in conditions:
        frame = pd.DataFrame(dict(image_id=[f"i{k}" for k in range(n)], patient_id=[f"p{k}" for k in range(n)], condition=condition,
                                  s_q=0., s_e=0.)).assign(**who)
        noise = sum(map(float, re.findall(r"[\d.]+", condition)))/10
        if "y_true" in who: frame["y_true"] = np.arange(n) % 2
        if "y_true" in who: rows.append(frame.assign(y_score=.3 + .4*frame.y_true*(1 - noise) + .2*rng.random(n))); continue
        if who["task"] == "restore":
            scores = {m: best - drop*noise*best + .02*rng.random(n) for m, best in (("psnr", 32.), ("ssim", .9), ("haarpsi", .9))}
            rows.append(frame.assign(output="image", bias=noise*rng.normal(size=n), floor_psnr=10., **scores))
            continue
        dice = .9 - drop*noise + .02*rng.random(n)
        rows.append(frame.assign(structure="lungs", dice=dice, iou=dice/(2 - dice), floor_dice=.4, floor_iou=.25))
    folder = Path(runs)/name
    folder.mkdir(parents=True)
    pd.concat(rows, ignore_index=True).to_parquet(folder/"records.parquet")
    (folder/"history.csv").write_text("epoch\n0\n")
    files = {file.name: file_digest(file) for file in folder.iterdir()}
    given = {k: who[k] for k in ("dataset", "task", "arch", "train_noise", "seed")} | (parameters or {})
    (folder/"run.json").write_text(json.dumps(dict(run=name, rows=n, parameters=given, files=files)))
    return folder


def rewrite(folder, **changes):
    card = json.loads((folder/"run.json").read_text())
    (folder/"run.json").write_text(json.dumps(card | changes))


DAMAGE = {
    "deep": lambda f: (f/"run.json").write_text("["*200_000),
    "a list": lambda f: (f/"run.json").write_text("[]"),
    "not UTF-8": lambda f: (f/"run.json").write_bytes(b"\xff\xfe{"),
    "numbers for tables": lambda f: rewrite(f, parameters=5),
    "files is text": lambda f: rewrite(f, files="records.parquet"),
    "null digest": lambda f: rewrite(f, files={"records.parquet": None}),
    "another name": lambda f: rewrite(f, run="someone else"),
    "changed": lambda f: (f/"history.csv").write_text("epoch\n1\n"),
    "missing": lambda f: (f/"history.csv").unlink(),
    "no records": lambda f: (f/"records.parquet").unlink(),
}
RECORDS = {
    "texts for scores": lambda r: r.assign(dice="high"),
    "no patients": lambda r: r.drop(columns="patient_id"),
    "an image lacks a condition": lambda r: r.iloc[1:],
    "no rows": lambda r: r.iloc[:0],
    "another run's records": lambda r: r.assign(run="good"),
}


def damaged(runs, name):
    folder = made_run(runs, name)
    if name in DAMAGE: return DAMAGE[name](folder)
    RECORDS[name](pd.read_parquet(folder/"records.parquet")).to_parquet(folder/"records.parquet")
    rewrite(folder, files={"records.parquet": file_digest(folder/"records.parquet")})      # with digests that agree


@pytest.mark.parametrize("name", [*DAMAGE, *RECORDS])
def test_14_12_a_damaged_run_is_named_and_set_aside(tmp_path, name):
    made_run(tmp_path, "good")
    damaged(tmp_path, name)
    records, notes = read_runs(tmp_path)
    assert set(records.run) == {"good"}
    assert len(notes) == 1 and notes[0].startswith(f"{name} is left out: ") and "\n" not in notes[0]


def test_14_12_hostile_names_and_damaged_runs_on_the_page(tmp_path):
    runs, figures = tmp_path/"data"/"runs", tmp_path/"data"/"runs"/"figures"
    made_run(runs, "plain")
    made_run(runs, "matched", drop=.1, train_noise="0,10")
    made_run(runs, "range", drop=.1, train_noise="0..10,0")                        # a range, not a condition
    made_run(runs, "html", dataset=HOSTILE, test_set=HOSTILE, arch=HOSTILE, source=HOSTILE)
    made_run(runs, "mathematics", dataset=r"$\frac$", test_set=r"$\frac$", arch="$x_{")
    made_run(runs, "path", task="../../x|y", y_true=0, finding="y")
    made_run(runs, "elsewhere", test_set="another hospital", drop=.2)
    made_run(runs, "unknown", train_noise="fog=3", conditions=("0,0", "0,10", "fog=3"), floor_haze=.1, haze=.7,
             parameters=dict(extend="fog.py"))
    made_run(runs, "unknown alone", dataset="foggy", test_set="foggy", conditions=("0,0", "fog=3"))
    made_run(runs, "denoised", drop=.2, denoiser="nlm", parameters=dict(denoiser="nlm"))
    made_run(runs, "restored", task="restore", arch="skidnet", train_noise="nonuniform",
             conditions=("0,0", "0,10", "quantum=4@centre", "quantum=8@centre"))
    for name in ("deep", "null digest", "texts for scores"): damaged(runs, name)
    page = report(tmp_path, runs)
    assert "<img src=x" not in page and "onerror=alert(1)&gt;" in page and not outside(page)
    assert all(f"{name} is left out" in page for name in ("deep", "null digest", "texts for scores"))
    assert "fog=3" in page and "haze" in page and "fog.py" in page                  # shown as they are, and named
    assert "tested on another hospital" in page
    assert INTERVAL in page and "(Holm, level 0.05)" in page                        # the method in use, the adjustment
    assert all(text in page for text in ("PSNR / dB", "quantum=4@centre", "trained on clean, denoiser nlm"))
    files = {file for file in tmp_path.rglob("*") if file.suffix in (".svg", ".png", ".csv")} - set(runs.rglob("*/history.csv"))
    assert files and all(file.parent == figures for file in files), files
    assert "made_lungs.csv" in {f.name for f in files} and not any(re.search("[0-9a-f]{8}", f.stem) for f in files)
    assert "stderr" not in (tmp_path/"results.ipynb").read_text()


def test_a_report_of_nothing_says_so(tmp_path):
    page = report(tmp_path, tmp_path/"no runs")
    assert "There is no finished run" in page and "no runs is no folder" in page and "claims are inconclusive for lack of runs of lungs" in page
    assert not outside(page) and not list((tmp_path/"no runs").rglob("*.csv"))


def test_reports_of_own_runs_leave_tracked_figures_alone():
    makefile = (ROOT/"Makefile").read_text()
    assert re.search(r"^figures:.*\n\t.*draw_figures", makefile, re.M)
    assert "figures_dir" not in re.search(r"^report:.*\n(\t.*\n)+", makefile, re.M)[0]


def test_every_tracked_figure_is_drawn_from_the_numbers_beside_it(tmp_path):
    shutil.copytree(ROOT/"figures", tmp_path/"figures", ignore=shutil.ignore_patterns("*.png", "*.svg"))
    drawn = {file.name for file in draw_figures(tmp_path/"figures")}
    tracked = {file.name for file in (ROOT/"figures").iterdir() if file.suffix in (".png", ".svg")}
    assert drawn == tracked
    readme = (ROOT/"figures"/"README.md").read_text()
    assert all(name.rpartition(".")[0] in readme for name in tracked)


def test_the_front_page_is_computed_from_tracked_numbers():
    numbers = ROOT/"figures"/"wingspan_lungs_protocol.csv"
    clean = pd.read_csv(numbers).query("train_noise == 'clean' and metric == 'dice' and s_q == 0 and s_e == 10").iloc[0]
    said = headline(numbers, "dice", "0,10")
    assert f"{clean.value:.2f} [{clean.low:.2f}, {clean.high:.2f}] at electronic severity 10" in said
    assert "32 test radiographs of 32 patients, 1 seed" in said and "trained on noise (ladder)" in said
    assert glance(numbers, "dice").splitlines()[0].endswith("intervals (percentile); failures in up to 9 % of patients may be unseen.")


FINDINGS = ROOT/"data"/"findings"


def clean_trained(study="segmentation"):
    "Dice by structure and condition of the published clean-trained networks, averaged over seeds and architectures by pandas alone."
    records = pd.read_parquet(FINDINGS/study/"records")
    records = records[(records.task == "lungs_heart") & (records.train_noise == "clean") & (records.denoiser == "") & (records.adapt == "")]
    seeds = records.groupby(["structure", "condition", "arch", "seed"], observed=True).dice.mean()
    return seeds.groupby(["structure", "condition", "arch"], observed=True).mean().groupby(["structure", "condition"], observed=True).mean()


@pytest.mark.parametrize("page", ["README.md", "nbs/30_findings.ipynb"])
def test_18_numbers_of_the_front_page_and_of_the_findings_by_pandas_alone(page):
    dice, text = clean_trained(), (ROOT/page).read_text(encoding="utf-8")
    lungs = dice["lungs"]
    assert f"costs the lungs {lungs['0,0'] - lungs['0,1']:.2f} [" in text
    assert f"the lungs lose {lungs['0,0'] - lungs['0.217,0']:.4f} [" in text
    assert f"{lungs['0,10']:.3f} [" in text


def test_18_images_of_another_size_by_pandas_alone():
    small, large = (clean_trained(name)["lungs"] for name in ("segmentation", "segmentation_256"))
    costs = [dice["0,0"] - dice["0,1"] for dice in (small, large)]
    said = pd.read_csv(FINDINGS/"findings.csv").set_index("name").sentence["size of the images"]
    assert f"costs the lungs {costs[1]:.2f} [" in said and f"{abs(costs[1] - costs[0]):.2f} [" in said
    assert said.endswith("more." if costs[1] > costs[0] else "less.")


def test_18_networks_of_phantoms_by_pandas_alone():
    dice = pd.concat(pd.read_parquet(FINDINGS/name/"records") for name in ("phantom", "phantom_covid"))
    dice = dice[(dice.dataset == "phantom") & (dice.condition == "0,0")].groupby(["augment", "test_set", "seed"], observed=True).dice.mean()
    mean = dice.groupby(["augment", "test_set"], observed=True).mean()
    said = pd.read_csv(FINDINGS/"findings.csv").set_index("name").sentence
    assert f"scores {mean['grey', 'wingspan']:.2f} [" in said["phantoms alone"]
    assert f"it scores {mean['grey', 'covid']:.2f} [" in said["phantoms, another source"]
    assert f", {mean['grey', 'covid'] - mean['flip', 'covid']:.2f} [" in said["phantoms, another source"]
    assert all(said[name] in (ROOT/"README.md").read_text() for name in ("phantoms alone", "phantoms, another source"))


def test_18_classifiers_by_scikit_learn():
    rows = pd.read_parquet(FINDINGS/"classification"/"records")
    rows = rows[(rows.dataset == "pediatric") & (rows.weights == "none") & rows.condition.isin(["0,0", "0,1"])]
    areas = {key: roc_auc_score(part.y_true, part.y_score)
             for key, part in rows.groupby(["train_noise", "condition", "arch", "seed"], observed=True)}
    mean = pd.Series(areas).groupby(level=[0, 1, 2]).mean().groupby(level=[0, 1]).mean()
    said = pd.read_csv(FINDINGS/"findings.csv").set_index("name").sentence
    assert f"lose {mean['clean', '0,0'] - mean['clean', '0,1']:.2f} [" in said["classification"]
    assert f"wins back {mean['ladder', '0,1'] - mean['clean', '0,1']:.2f} [" in said["classification, training on noise"]


def test_18_published_scores_are_small_and_say_nothing_about_whose_disk_they_lay_on():
    assert sum(file.stat().st_size for file in FINDINGS.rglob("*") if file.is_file()) < 20e6
    assert not read_runs(FINDINGS)[1]
    for file in FINDINGS.glob("*/runs.parquet"):
        for card in map(json.loads, pd.read_parquet(file).run_json):
            assert not [value for value in card["parameters"].values() if isinstance(value, str) and value.startswith(("/", "~"))]
            assert "machine" not in card and card["versions"] and card["data_hash"]


def test_18_an_interval_over_patients_and_seeds_is_wider_than_over_patients_alone(tmp_path):
    for seed, drop in enumerate((.3, .4, .5)): made_run(tmp_path, f"s{seed}", seed=seed, drop=drop)
    records = read_runs(tmp_path)[0]
    both, alone = (summarise_pools(pools(r)).query("metric == 'dice' and condition == '0,10'").iloc[0] for r in (records, records[records.seed == 1]))
    assert both.high - both.low > 3*(alone.high - alone.low)
    assert both.value == pytest.approx(records[records.condition == "0,10"].dice.mean())
    spread = records[records.condition == "0,10"].groupby("seed").dice.mean().std()/np.sqrt(3)      # patients differ little
    assert both.high - both.low == pytest.approx(2*4.303*spread, rel=.1)                            # t with two degrees of freedom


def test_18_a_verdict_that_one_seed_carries_is_marked(tmp_path):
    for seed, drop in enumerate((.843, .843, .843, .5)): made_run(tmp_path, f"s{seed}", seed=seed, n=40, drop=drop, conditions=("0,0", "0,10"))
    used = claim_pools(pools(read_runs(tmp_path)[0]))
    hangs = fragile(lambda left_out: judge_claims(used, left_out=left_out), units_of(used["lungs"]) | {"patient": ["p0"]})
    claim = "lungs: Dice falls by 0.843 at s_e = 10"
    assert hangs[claim] == "1 of 4 seeds"
    assert judge_claims(used).set_index("claim").verdict[claim] == "inconclusive"


def test_14_7_a_wide_interval_supports_nothing():
    "An interval that happens to hold the number holds most other numbers too."
    assert number_verdict(-.95, -.01, -.843) == "inconclusive"
    assert number_verdict(-.843 - MARGIN, -.843 + MARGIN, -.843) == "supported"
    assert number_verdict(-.80, -.70, -.843) == "not supported" == number_verdict(-.95, -.90, -.843)


def test_14_7_fewer_patients_never_mean_more_support(tmp_path):
    supported = []
    for n in (200, 20, 4):
        made_run(tmp_path/str(n), "run", n=n, drop=.843, conditions=("0,0", "0,10"))
        table = claims_table(read_runs(tmp_path/str(n))[0])
        supported.append(int((table.verdict == "supported").sum()))
        assert table.p_holm.dropna().ge(table.p.dropna()).all()
    assert supported == [1, 1, 0]


def test_14_7_a_verdict_needs_a_number_and_an_interval():
    for low, high, number, message in ((.1, .2, np.nan, "finite number, got nan"), (.2, .1, .15, "low must not exceed high"),
                                       (.1, .2, np.inf, "finite number, got inf")):
        for verdict in number_verdict, bound_verdict:
            with pytest.raises(ValueError, match=message): verdict(low, high, number)
    assert number_verdict(np.nan, np.nan, .5) == "inconclusive" == bound_verdict(np.nan, np.nan, .5)


def test_14_7_claims_of_no_records_are_refused_in_one_line_or_inconclusive(tmp_path):
    with pytest.raises(ValueError, match="records have no column dataset, task") as e: claims_table(pd.DataFrame())
    assert "\n" not in str(e.value)
    table = claims_table(read_runs(tmp_path)[0])
    assert len(table) and table.verdict.str.startswith("inconclusive").all()


def test_14_8_patients_who_all_agree_give_a_claim_the_rule_of_three(tmp_path):
    for n, verdict in (200, "supported"), (12, "inconclusive"):
        folder = made_run(tmp_path/str(n), "run", n=n, conditions=("0,0", "0,10"))
        records = pd.read_parquet(folder/"records.parquet")
        records["dice"] = np.where(records.condition == "0,10", .05, .9)
        records.to_parquet(folder/"records.parquet")
        rewrite(folder, files={"records.parquet": file_digest(folder/"records.parquet")})
        table = claims_table(read_runs(tmp_path/str(n))[0]).set_index("claim")
        row = table.loc["lungs: Dice falls by 0.843 at s_e = 10"]
        assert row.interval == "rule of three" and row.high - row.low > .02 and row.verdict == verdict


def test_14_7_a_model_behind_a_denoiser_does_not_speak_for_the_paper(tmp_path):
    made_run(tmp_path, "plain", drop=.843)
    made_run(tmp_path, "denoised", drop=.1, denoiser="nlm", arch="fpn", parameters=dict(denoiser="nlm"))
    table = claims_table(read_runs(tmp_path)[0]).set_index("claim")
    assert table.ours["lungs: Dice falls by 0.843 at s_e = 10"] < -.8


def test_15_runs_that_differ_by_their_denoiser_are_never_pooled(tmp_path):
    made_run(tmp_path, "plain", drop=.8)
    made_run(tmp_path, "denoised", drop=.2, denoiser="nlm", parameters=dict(denoiser="nlm"))
    made_run(tmp_path, "another", drop=.2, denoiser="bm3d", parameters=dict(denoiser="bm3d"))
    records = read_runs(tmp_path)[0]
    summary = summarise_runs(records)
    assert len(pools(records)) == 3 and summary.model.nunique() == 3 and not matched_pairs(records)
    assert {"nlm", "bm3d", ""} == set(summary.denoiser) and summary.model[summary.denoiser == "nlm"].str.contains("nlm").all()
    with pytest.raises(ValueError, match="several values of denoiser: , bm3d, nlm"): summarise(records.drop(columns="run"))
    said = headline(save_numbers(summary, "x", tmp_path), "dice", "0,10")
    assert "trained on clean images, 0.9" in said and "trained on clean images behind " in said and "mean of" not in said


def test_15_a_restoration_run_is_read_summarised_and_drawn(tmp_path):
    made_run(tmp_path, "r", task="restore", arch="skidnet", train_noise="0.5*speckle=3@centre+0.5*0,4",
             conditions=("0,0", "0,10", "quantum=4@centre", "quantum=8@centre"))
    records, notes = read_runs(tmp_path)
    summary = summarise_runs(records)
    assert not notes and main_metric(summary).name == "psnr" and worst_condition(summary) == "0,10"
    assert set(summary.metric) == {"psnr", "ssim", "haarpsi", "bias"} and set(summary.output) == {"image"}
    rows = results_figure(summary).axes
    assert [bool(ax.get_lines()) for ax in rows] == [True, True] and "at centre" in "".join(ax.get_xlabel() for ax in rows).replace("@", " at ")
    assert "PSNR" in headline(summary, "psnr", "0,10") and "speckle" in headline(summary, "psnr", "0,10")
    assert claims_table(records).verdict.str.startswith("inconclusive: no run of").all()


def test_18_claims_of_fewer_architectures_are_their_own(tmp_path):
    for arch, drop in (("unet", .3), ("fpn", .6)):
        for seed in (0, 1): made_run(tmp_path, f"{arch}{seed}", seed=seed, n=20, drop=drop, conditions=("0,0", "0,10"), arch=arch)
    used = claim_pools(pools(read_runs(tmp_path)[0]))
    claim = "lungs: Dice falls by 0.843 at s_e = 10"
    both = judge_claims(used).set_index("claim").ours[claim]           # first: what it remembers must not be read below
    fpn = judge_claims(used | {"lungs": of_archs(used["lungs"], {"fpn"})}).set_index("claim").ours[claim]
    assert (both, fpn) == (pytest.approx(-.45, abs=.02), pytest.approx(-.6, abs=.02))
