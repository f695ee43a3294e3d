"Data sets in the layouts in which they are published, splits by property, killed stores, broken files."
import gzip, re, unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from cxr_noise_study.datasets import (DATASETS, DRAWN_ON, CONTOURS, NIH_COLUMNS, PUBLISHED, SPLITS, Dataset,
                                      load_radiographs, plan_pairs, prepare_landmark, split_classes, split_patients)
from cxr_noise_study.description import cohort_table, leakage, leakage_summary
from cxr_noise_study.images import fill_contour, read_grey
from cxr_noise_study.phantom import phantom
from cxr_noise_study.tasks import Findings, Segmentation

SLOW = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


# ---- splits, by property

@st.composite
def cohorts(draw, most=120):
    "Patients with one to many images, a source and classes: sometimes tiny, sometimes lopsided."
    n = draw(st.integers(1, most)); rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    images = np.minimum(rng.geometric(draw(st.floats(.2, 1)), n), 30)
    patient = np.repeat([f"p{i}" for i in range(n)], images)
    ill = rng.random(n) < draw(st.sampled_from([.02, .1, .5, .9]))
    mixed = rng.random(n) < draw(st.sampled_from([0, .2]))
    positive = np.where(np.repeat(mixed, images), rng.random(len(patient)) < .5, np.repeat(ill, images)).astype(int)
    source = np.repeat(rng.choice(list("ABCD"), n, p=[.7, .2, .07, .03]), images)
    return patient, source, positive, rng


@SLOW
@given(cohorts(), st.integers(0, 99))
def test_split_patients_by_property(cohort, seed):
    patient, source, _, rng = cohort
    split = split_patients(patient, source, seed)
    dealt = pd.DataFrame(dict(p=patient, s=split, source=source))
    assert set(split) <= set(SPLITS) and dealt.groupby("p").s.nunique().max() == 1
    order = rng.permutation(len(patient))
    assert (split_patients(patient[order], source[order], seed) == split[order]).all()
    heaviest = dealt.groupby("p").size().max()
    for k, share in SPLITS.items():                       # dealing is greedy: no split is off by more than two patients
        assert abs((split == k).sum() - share*len(split)) <= 2*heaviest*dealt.source.nunique()
    renamed = np.array([f"site-{s}" for s in source])
    assert len(set(split_patients(patient, renamed, seed))) <= 3


@SLOW
@given(cohorts(), st.integers(0, 99))
def test_split_classes_by_property(cohort, seed):
    patient, _, positive, rng = cohort
    split, note = split_classes(patient, positive, seed)
    dealt = pd.DataFrame(dict(p=patient, s=split, y=positive))
    assert set(split) <= set(SPLITS) and dealt.groupby("p").s.nunique().max() == 1
    order = rng.permutation(len(patient))
    again, _ = split_classes(patient[order], positive[order], seed)
    assert (again == split[order]).all()
    fewest = min((dealt[dealt.y == k].p.nunique() for k in (0, 1)))
    assert bool(note) == (fewest < 20) and (str(fewest) in note) == bool(note)
    if fewest >= 20:
        heaviest = dealt.groupby("p").size().max()
        assert set(split) == set(SPLITS)
        for k, share in SPLITS.items(): assert abs((split == k).sum() - share*len(split)) <= 3*heaviest + 3


def test_class_balance_holds_within_two_points_in_a_cohort_of_the_size_of_a_real_pair():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        images = np.minimum(rng.geometric(.4, 1500), 60)
        patient = np.repeat([f"{i}" for i in range(1500)], images)
        positive = np.repeat(rng.random(1500) < .12, images).astype(int)
        split, note = split_classes(patient, positive, seed)
        assert not note
        for k, share in SPLITS.items():
            assert abs((split == k).mean() - share) < .01
            assert abs(positive[split == k].mean() - positive.mean()) < .02


def test_one_class_or_too_few_patients_are_refused_in_words(tmp_path):
    write_nih(tmp_path, [("1", "Effusion"), ("2", "Edema"), ("3", "Edema"), ("4", "Effusion")])
    with pytest.raises(ValueError, match="no image in split|holds one class only"):
        load_radiographs("chestxray14", "Effusion|Edema", tmp_path, 32, cache_dir=tmp_path/"cache")


# ---- ChestX-ray14

HEADERS = {"plain": ",".join([*NIH_COLUMNS, "OriginalImage[Width,Height]", "OriginalImagePixelSpacing[x,y]"]),
           "quoted": ",".join([*NIH_COLUMNS, '"OriginalImage[Width,Height]"', '"OriginalImagePixelSpacing[x,y]"'])}


def write_nih(root, rows, header="plain", packed=False, folders=("images",), ends="\n", bom=b"",
              name="Data_Entry_2017.csv"):
    "Write rows of (patient, labels[, file name]) in ChestX-ray14's layout; returns the names."
    root.mkdir(exist_ok=True); rng, lines, names = np.random.default_rng(0), [HEADERS[header]], []
    for i, (patient, labels, *given_name) in enumerate(rows):
        names.append(given_name[0] if given_name else f"{int(patient or 0):08d}_{i:03d}.png")
        lines.append(f"{names[-1]},{labels},{i},{patient},0{40 + i % 30}Y,{'MF'[i % 2]},{('PA', 'AP')[i % 3 > 0]},2500,2048,0.1,0.1")
        if "/" in names[-1] or not names[-1]: continue
        folder = root/folders[i % len(folders)]; folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40)).astype(np.uint8)).save(folder/names[-1])
    text = bom + (ends.join(lines) + ends).encode()
    (root/(name + ".gz"*packed)).write_bytes(gzip.compress(text) if packed else text)
    return names


MANY = [(str(1 + i//2), ["Effusion", "Edema", "Edema|Effusion", "Mass"][i//2 % 4]) for i in range(240)]


@pytest.mark.parametrize("how", [dict(), dict(header="quoted"), dict(packed=True, name="Data_Entry_2017_v2020.csv"),
                                 dict(ends="\r\n", bom=b"\xef\xbb\xbf", header="quoted"),
                                 dict(folders=[f"images_{k:03d}/images" for k in range(1, 13)])],
                         ids=["plain", "header with commas", "gzipped", "byte-order mark, Windows", "twelve folders"])
def test_chestxray14_as_published(tmp_path, how):
    names = write_nih(tmp_path/"nih", MANY, **how)
    data = load_radiographs("chestxray14", "Effusion|Edema", str(tmp_path/"nih"), 32, cache_dir=tmp_path/"cache")
    want = {n: int(labels == "Edema") for n, (_, labels) in zip(names, MANY) if labels in ("Edema", "Effusion")}
    assert dict(zip(data.table.image_id, data.targets[:, 0])) == want and data.outputs == ("Edema",)
    assert data.left_out["shows both Effusion and Edema"] == 60 and data.left_out["shows neither"] == 60
    assert data.table.groupby("patient_id")["split"].nunique().max() == 1 and not data.faults
    assert set(data.table.sex) == {"M", "F"} and set(data.table["view"]) == {"PA", "AP"}
    assert data.table.age.between(40, 69).all() and (data.table.height == 40).all()
    for name in SPLITS:
        y = data.targets[data.where(name)]
        assert abs(y.sum() - len(y)/2) <= 2                                             # one patient of two images


def test_chestxray14_without_its_images(tmp_path):
    names = write_nih(tmp_path/"nih", MANY)
    assert len(plan_pairs(tmp_path/"nih", ["Effusion|Edema"])) == 1
    gone = [n for n, (_, labels) in zip(names, MANY) if labels == "Edema"][:7]
    for name in gone: (tmp_path/"nih"/"images"/name).unlink()
    data = load_radiographs("chestxray14", "Effusion|Edema", tmp_path/"nih", 32, cache_dir=tmp_path/"cache")
    assert data.missing == tuple(gone) and data.left_out["not on disk"] == 7 and len(data) == 113
    for file in (tmp_path/"nih"/"images").iterdir(): file.unlink()
    with pytest.raises(FileNotFoundError, match="none of 120 images for this task is on disk"):
        load_radiographs("chestxray14", "Effusion|Edema", tmp_path/"nih", 32, cache_dir=tmp_path/"cache")
    assert len(plan_pairs(tmp_path/"nih", ["Effusion|Edema"])) == 1                          # planning needs none


def test_chestxray14_official_split(tmp_path):
    names = write_nih(tmp_path/"nih", MANY)
    test = {n for n, (patient, _) in zip(names, MANY) if int(patient) % 5 == 0}
    (tmp_path/"nih"/"test_list.txt").write_text("\r\n".join(sorted(test)))
    (tmp_path/"nih"/"train_val_list.txt").write_text("\n".join(n for n in names[:-2] if n not in test) + "\n")
    data = load_radiographs("chestxray14", "Effusion|Mass", str(tmp_path/"nih"), 32, cache_dir=tmp_path/"cache",
                            split="official")
    assert set(data.table.image_id[data.where("test")]) == test & set(data.table.image_id)
    assert data.table.groupby("patient_id")["split"].nunique().max() == 1
    assert abs(len(data.where("valid"))/(len(data.where("valid")) + len(data.where("train"))) - 3/17) < .03
    (tmp_path/"nih"/"test_list.txt").write_text("\n".join(sorted(test - {names[8]})))
    (tmp_path/"nih"/"train_val_list.txt").write_text("\n".join(n for n in names if n not in test - {names[8]}))
    with pytest.raises(ValueError, match="patient '5' is in test_list.txt and train_val_list.txt"):
        load_radiographs("chestxray14", "Effusion|Edema", tmp_path/"nih", 32, cache_dir=tmp_path/"cache", split="official")


@pytest.mark.parametrize("row,what", [((("1", "Edema", "00000001_000.png")), "is listed for the second time"),
                                      (("9", "Edemma"), "unknown label 'Edemma'. Did you mean 'Edema'?"),
                                      (("9", "Edema", "../9.png"), "leads out of the data folder"),
                                      (("", "Edema"), "no patient"),
                                      (("9", "No Finding|Edema"), "hold No Finding and a finding")])
def test_chestxray14_faults_have_file_and_row(tmp_path, row, what):
    write_nih(tmp_path/"nih", [*MANY, row])
    with pytest.raises(ValueError) as error:
        load_radiographs("chestxray14", "Effusion|Edema", tmp_path/"nih", 32, cache_dir=tmp_path/"cache")
    assert f"Data_Entry_2017.csv row {len(MANY) + 2}: " in str(error.value) and what in str(error.value)
    data = load_radiographs("chestxray14", "Effusion|Edema", tmp_path/"nih", 32, cache_dir=tmp_path/"cache", on_error="skip")
    assert len(data) == 120 and len(data.faults) == 1 and what in data.faults[0]


# ---- Landmark

NAMES = {"JSRT": "JPCNN{:03d}", "Padchest": "{:020d}_ab{:02d}", "Shenzhen": "CHNCXR_{:04d}_0",
         "Montgomery": "MCUCXR_{:04d}_0"}


def oval(part, n, shift=0):
    "n points of an ellipse where lungs and heart are, in pixels of 1024."
    x, y, a, b = {"RL": (300, 480, 150, 330), "LL": (720, 480, 150, 330), "H": (560, 640, 130, 160)}[part]
    t = np.linspace(0, 2*np.pi, n, endpoint=False)
    return np.column_stack([x + shift + a*np.cos(t), y + b*np.sin(t)])


def write_landmark(root, counts, size=48):
    "Write the tree of the Landmark repository."
    for folder in ("Images", *(f"landmarks/{part}" for part in CONTOURS)): (root/folder).mkdir(parents=True)
    rows, rng = [], np.random.default_rng(0)
    for source, n in counts.items():
        for i in range(n):
            stem, hearts = NAMES[source].format(i + 1, i), source in ("JSRT", "Padchest")
            for part in ("RL", "LL", "H") if hearts else ("RL", "LL"):
                np.save(root/"landmarks"/part/f"{stem}.npy", oval(part, CONTOURS[part][1], i % 7).astype(np.float32))
            Image.fromarray(rng.integers(0, 256, (size, size)).astype(np.uint8)).save(root/"Images"/f"{stem}.png")
            rows.append({"File": f"{stem}.png", "Dataset": source, "Lung Annotations": True,
                         "Heart Annotations": hearts,
                         "Sex": "MF"[i % 2], "Age": 50, "Condition": "normal"})
    table = pd.DataFrame(rows); table.to_csv(root/"clinical.csv", index=False)
    return table


def test_landmark_as_published(tmp_path, capsys):
    table = write_landmark(tmp_path/"lm", PUBLISHED)
    table.loc[table.File == "MCUCXR_0007_0.png", "Condition"] = "stable (same pt as MCUCXR_0003_0)"
    table.to_csv(tmp_path/"lm"/"clinical.csv", index=False)
    lungs = load_radiographs("landmark", "lungs", str(tmp_path/"lm"), 32, cache_dir=tmp_path/"cache")
    assert lungs.table.source.value_counts().to_dict() == PUBLISHED and len(lungs) == 911
    assert re.search(r"Shenzhen +390 +0 +390$", capsys.readouterr().out, re.MULTILINE)       # on disk, published
    own = lungs.table.set_index("image_id")
    assert own.patient_id["MCUCXR_0007_0.png"] == own.patient_id["MCUCXR_0003_0.png"]
    assert own.patient_id.nunique() == 910 and set(own.sex) == {"M", "F"}
    for source, n in PUBLISHED.items():
        part = own["split"][own.source == source].value_counts()
        for name, share in SPLITS.items(): assert abs(part[name] - share*n) <= 2
    for task, n in (("heart", 383), ("lungs_heart", 383)):
        data = load_radiographs("landmark", task, str(tmp_path/"lm"), 32, cache_dir=tmp_path/"cache")
        assert len(data) == n and data.left_out["no mask"] == 528
        assert (own["split"][data.table.image_id].to_numpy() == data.table["split"].to_numpy()).all()   # one split for all
    one = load_radiographs("landmark", "lungs", str(tmp_path/"lm"), 32, cache_dir=tmp_path/"cache", source="Shenzhen")
    assert len(one) == 390 and set(one.table.source) == {"Shenzhen"}
    with pytest.raises(ValueError, match="not one of all, JSRT, Montgomery, Padchest, Shenzhen. Did you mean 'Shenzhen'?"):
        load_radiographs("landmark", "lungs", str(tmp_path/"lm"), 32, source="Shenzen")


@pytest.mark.parametrize("size", [64, 224, 512, 1024])
def test_contours_agree_with_an_independent_rasteriser(size):
    for part, (_, n) in CONTOURS.items():
        points = oval(part, n) + np.random.default_rng(n).normal(0, 6, (n, 2))
        k = {64: 45, 224: 13}.get(size, 5)         # Pillow, which also draws the outline, hence many times finer;
        drawn = Image.new("1", (k*size, k*size)); scaled = (points + .5)*k*size/DRAWN_ON - .5
        ImageDraw.Draw(drawn).polygon([tuple(p) for p in scaled], fill=1)
        other = np.asarray(drawn)[k//2::k, k//2::k]
        ours = fill_contour(points, size)
        assert 2*(ours & other).sum()/(ours.sum() + other.sum()) > .995


def test_landmark_masks_scale_with_the_image(tmp_path):
    write_landmark(tmp_path/"lm", {"JSRT": 40}, size=96)
    data = load_radiographs("landmark", "lungs_heart", tmp_path/"lm", 128, cache_dir=tmp_path/"cache")
    for i in range(0, len(data), 7):
        shift = (int(data.table.image_id[i][5:8]) - 1) % 7
        y, x = np.mgrid[:128, :128]*8 + 3.5                           # centres of the small pixels in pixels of 1024
        def ellipse(cx, cy, a, b): return ((x - cx - shift)/a)**2 + ((y - cy)/b)**2 < 1
        want = np.stack([ellipse(300, 480, 150, 330) | ellipse(720, 480, 150, 330), ellipse(560, 640, 130, 160)])
        got = data.targets[i] > 0
        assert (2*(got & want).sum((1, 2))/(got.sum((1, 2)) + want.sum((1, 2))) > .985).all()  # 26 chords of an ellipse


def test_landmark_faults_have_file_and_row(tmp_path):
    table = write_landmark(tmp_path/"lm", {"JSRT": 30, "Shenzhen": 30})
    bad = table.copy()
    bad.loc[1, "File"], bad.loc[3, "Dataset"], bad.loc[5, "File"] = bad.File[0], "Shenzen", "../x.png"
    bad.to_csv(tmp_path/"lm"/"clinical.csv", index=False)
    (tmp_path/"lm"/"landmarks"/"LL"/f"{Path(table.File[7]).stem}.npy").unlink()
    with pytest.raises(ValueError) as error: load_radiographs("landmark", "lungs", tmp_path/"lm", 32, cache_dir=tmp_path/"cache")
    for what in ("clinical.csv row 3: image 'Images/JPCNN001.png' is listed for the second time", "row 5: source 'Shenzen' is not one of",
                 "Did you mean 'Shenzhen'?", "row 7: image 'Images/../x.png' leads out",
                 "row 9: lungs 'landmarks/LL/JPCNN008.npy' is not there"): assert what in str(error.value)
    table.to_csv(tmp_path/"lm"/"clinical.csv", index=False)
    np.save(tmp_path/"lm"/"landmarks"/"LL"/"JPCNN008.npy", oval("LL", 49))
    np.save(tmp_path/"lm"/"landmarks"/"RL"/"JPCNN009.npy", np.full((44, 2), np.nan))
    (tmp_path/"lm"/"Images"/"JPCNN010.png").write_bytes(b"torn")
    with pytest.raises(ValueError) as error: load_radiographs("landmark", "lungs", tmp_path/"lm", 32, cache_dir=tmp_path/"cache")
    for what in ("row 9: contour 'landmarks/LL/JPCNN008.npy' must have shape (50, 2), got (49, 2)", "row 10: contour",
                 "row 11: image"):
        assert what in str(error.value)
    assert not list((tmp_path/"cache").glob("*"))
    data = load_radiographs("landmark", "lungs", tmp_path/"lm", 32, cache_dir=tmp_path/"cache", on_error="skip")
    assert len(data) == 57 and len(data.faults) == 3


def test_landmark_is_prepared_from_raw_files(tmp_path):
    write_landmark(tmp_path/"lm", {"JSRT": 2, "Montgomery": 2, "Padchest": 1})
    for file in (tmp_path/"lm"/"Images").iterdir(): file.unlink()
    (tmp_path/"raw"/"deep").mkdir(parents=True)
    values = np.zeros((2048, 2048), ">u2"); values[:1024] = 2048; values[0, 0] = 4095
    values.tofile(tmp_path/"raw"/"deep"/"JPCNN001.IMG")
    (tmp_path/"raw"/"JPCNN002.IMG").write_bytes(b"\0"*1000)
    framed = np.zeros((300, 500), np.uint8); framed[50:250, 100:420] = 120; framed[60:, :5] = 1
    Image.fromarray(framed).save(tmp_path/"raw"/"MCUCXR_0001_0.png")
    deep = framed.astype(np.uint16)*257
    Image.fromarray(deep).save(tmp_path/"raw"/f"{NAMES['Padchest'].format(1, 0)}.png")
    with pytest.raises(ValueError, match="clinical.csv row 3: .*JPCNN002.IMG must have 8388608 bytes, .*got 1000"):
        prepare_landmark(jsrt=tmp_path/"raw", out=tmp_path/"lm")
    counts = prepare_landmark(*[tmp_path/"raw"]*4, out=tmp_path/"lm", on_error="skip")
    assert counts.T.to_dict("list") == {"JSRT": [2, 1], "Montgomery": [2, 1], "Padchest": [1, 1]}
    jsrt = np.asarray(Image.open(tmp_path/"lm"/"Images"/"JPCNN001.png"))
    assert jsrt.shape == (1024, 1024) and (jsrt[1:500] == 128).all() and (jsrt[600:] == 255).all() and jsrt[0, 0] < 128
    box = np.asarray(Image.open(tmp_path/"lm"/"Images"/"MCUCXR_0001_0.png"))                # 320×200 within 320×320
    assert (box[:190] == 0).all() and (box[200:820] == 120).all() and (box[835:] == 0).all()
    with Image.open(tmp_path/"lm"/"Images"/f"{NAMES['Padchest'].format(1, 0)}.png") as image:
        assert image.mode == "I;16" and np.asarray(image).max() == 120*257
    assert not list((tmp_path/"lm"/"Images").glob(".*"))


# ---- a folder, and what can be wrong with it

few_phantoms = lru_cache(lambda: phantom(8, size=48))


@pytest.fixture
def mine(tmp_path):
    "Forty radiographs with masks and labels, and their manifest."
    root, made = tmp_path/"mine", few_phantoms(); rows = []
    for kind in ("images", "lungs", "heart", "maps"): (root/kind).mkdir(parents=True)
    for i in range(40):
        image = np.roll(made.images[i % 8], i, 1)
        lungs, heart = np.roll(made.lungs[i % 8], i, 1), np.roll(made.heart[i % 8], i, 1) & ~np.roll(made.lungs[i % 8],
                i, 1) & 1
        for kind, array in ("images", image), ("lungs", lungs*255), ("heart", heart*255), ("maps", lungs + 3*heart):
            Image.fromarray(array).save(root/kind/f"{i}.png")
        rows.append(dict(image=f"images/{i}.png", patient_id=f"p{i}", source="AB"[i % 2], lungs=f"lungs/{i}.png",
                         heart=f"heart/{i}.png", labels=["Edema", "Effusion"][i//2 % 2], sex=["male", "F"][i % 2]))
    table = pd.DataFrame(rows); table.to_csv(root/"manifest.csv", index=False)
    return root, table


def truncate(path): path.write_bytes(path.read_bytes()[:-200])
def grey(path): Image.fromarray(np.full((48, 48), 77, np.uint8)).save(path)
def small(path): Image.open(path).resize((24, 24), Image.Resampling.NEAREST).save(path)
def edit(column, value):
    def change(root, table): table.loc[4, column] = value(table) if callable(value) else value
    return change
def spoil(kind, how): return lambda root, table: how(root/kind/"4.png")
def two_splits(root, table):
    table["split"] = np.resize(["train", "train", "train", "valid", "test"], 40); table.loc[4, "patient_id"] = "p0"


CASES = {"truncated image": (spoil("images", truncate), "lungs",
                             "row 6: image 'images/4.png' cannot be used: is damaged", 39),
         "mask of another size": (spoil("lungs", small), "lungs",
                                  "row 6: lungs mask 'lungs/4.png' is 24×24, the image 48×48", 39),
         "empty mask": (spoil("lungs", grey), "lungs",
                        "row 6: lungs mask 'lungs/4.png' cannot be used: marks everything", 39),
         "one grey": (spoil("images", grey), "lungs", "row 6: image 'images/4.png' cannot be used: is flat", 39),
         "missing file": (edit("image", "images/none.png"), "lungs", "row 6: image 'images/none.png' is not there", 39),
         "name too long": (edit("lungs", "x"*300), "lungs", f"row 6: lungs '{'x'*300}' is not there", 39),
         "duplicate id": (edit("image", "./images/3.png"), "lungs",
                          "row 6: image './images/3.png' is listed for the second", 39),
         "unknown label": (edit("labels", "Efusion"), "Edema|Effusion",
                           "row 6: unknown label 'Efusion'. Did you mean 'Effusion'?", 39),
         "two splits": (two_splits, "lungs", "rows 2, 6: patient 'p0' is in more than one split (test, train)", 38),
         "out of the folder": (edit("lungs", "../lungs/4.png"), "lungs",
                               "row 6: lungs '../lungs/4.png' leads out of the data folder", 39),
         "absolute path": (edit("image", "/etc/passwd"), "lungs",
                           "row 6: image '/etc/passwd' leads out of the data folder", 39),
         "no patient": (edit("patient_id", " "), "lungs", "row 6: no patient_id", 39)}


@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["Unix", "BOM and Windows"])
@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_named_with_file_and_row_or_skipped_and_recorded(mine, tmp_path, case, ends):
    (root, table), (change, task, what, left) = mine, CASES[case]
    change(root, table)
    bom = b"\xef\xbb\xbf" if ends == "\r\n" else b""
    (root/"manifest.csv").write_bytes(bom + table.to_csv(index=False, lineterminator=ends).encode())
    with pytest.raises(ValueError) as error: load_radiographs("folder", task, root, 32, cache_dir=tmp_path/"cache")
    assert what in str(error.value) and "manifest.csv" in str(error.value) and "has 1 fault(s)" in str(error.value)
    assert not list((tmp_path/"cache").glob("*")) and not list((tmp_path/"cache").glob(".*"))  # nothing half-built
    data = load_radiographs("folder", task, root, 32, cache_dir=tmp_path/"cache", on_error="skip")
    assert len(data) == left and len(data.faults) == 1 and what in data.faults[0] and data.faults[0].startswith("manifest.csv")
    again = load_radiographs("folder", task, root, 32, cache_dir=tmp_path/"cache", on_error="skip")
    assert again.faults == data.faults and again.data_hash == data.data_hash  # reported again


@pytest.mark.parametrize("name", ["row", "where", "label", "unused"])
def test_14_15_columns_may_have_any_name(mine, tmp_path, name):
    root, table = mine
    plain = load_radiographs("folder", "lungs", root, 32, cache_dir=tmp_path/"cache")
    table.assign(**{name: "x"}).to_csv(root/"manifest.csv", index=False)
    data = load_radiographs("folder", "lungs", root, 32, cache_dir=tmp_path/"cache")
    assert data.data_hash == plain.data_hash
    edit("image", "images/none.png")(root, table); table.assign(**{name: "x"}).to_csv(root/"manifest.csv", index=False)
    with pytest.raises(ValueError, match="manifest.csv row 6: image 'images/none.png' is not there"):
        load_radiographs("folder", "lungs", root, 32, cache_dir=tmp_path/"cache")


def test_14_15_blanks_around_column_names_do_not_count(mine, plugin, tmp_path):
    root, table = mine
    plain = load_radiographs("folder", "lungs", root, 32, cache_dir=tmp_path/"cache")
    blanks = table.rename(columns={"patient_id": "patient_id ", "lungs": " lungs", "source": "source\t"})
    blanks.to_csv(root/"manifest.csv", index=False)
    assert load_radiographs("folder", "lungs", root, 32, cache_dir=tmp_path/"cache").data_hash == plain.data_hash
    plugin(manifest=lambda folder: blanks)
    data = load_radiographs("plugin", "lungs", root, 32, cache_dir=tmp_path/"cache")
    assert (data.targets == plain.targets).all() and set(data.table.source) == {"A", "B"} and "lungs" not in table.columns[-1]
    text = (root/"manifest.csv").read_text().split("\n")
    (root/"manifest.csv").write_text("\n".join([text[0] + ",,", *(line + ",," for line in text[1:] if line)]))
    assert len(load_radiographs("folder", "lungs", root, 32, cache_dir=tmp_path/"cache")) == 40     # empty columns at the end
    table.assign(**{"image ": table.image}).to_csv(root/"manifest.csv", index=False)
    with pytest.raises(ValueError, match="manifest.csv: column image is there 2 times"):
        load_radiographs("folder", "lungs", root, 32)


@pytest.mark.parametrize("row", ["images/4.png", "images/4.png,p4", 'images/4.png,p4,A,lungs/4.png,heart/4.png,"Edema,M'])
def test_14_15_short_rows_are_named(mine, row):
    root, _ = mine
    lines = (root/"manifest.csv").read_text().split("\n"); lines[5] = row
    (root/"manifest.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"manifest.csv (row 6 has \d fields, the first 7|is not a table in UTF-8)"):
        load_radiographs("folder", "lungs", root, 32)


@pytest.mark.parametrize("name", ["nan", "NaN", "None", "null", float("nan")])
def test_14_15_a_patient_without_a_name_is_not_one_patient(mine, plugin, name):
    root, table = mine
    table = table.assign(patient_id=[name if i in (4, 9) else f"p{i}" for i in range(40)])
    table.to_csv(root/"manifest.csv", index=False, na_rep="nan")
    with pytest.raises(ValueError, match="manifest.csv rows 6, 11: no patient_id"):
        load_radiographs("folder", "lungs", root, 32)
    plugin(manifest=lambda folder: table)
    with pytest.raises(ValueError, match="plugin rows 4, 9: no patient_id"): load_radiographs("plugin", "lungs", root, 32)


@pytest.mark.parametrize("one,other", [("P1", "p1"), ("Zoë", unicodedata.normalize("NFD", "Zoë"))])
def test_14_15_patients_that_look_alike_on_two_sides_of_a_split_warn(mine, tmp_path, one, other):
    root, table = mine
    table["split"] = np.resize(["train", "train", "train", "valid", "test"], 40)
    table["patient_id"] = [{0: one, 4: other}.get(i, f"x{i}") for i in range(40)]
    table.to_csv(root/"manifest.csv", index=False)
    with pytest.warns(UserWarning, match="are in different splits; one person needs one patient_id"):
        data = load_radiographs("folder", "lungs", root, 32, cache_dir=tmp_path/"cache")
    assert len(data) == 40 and [ascii(one) in fault and ascii(other) in fault for fault in data.faults] == [True]
    table.loc[4, "split"] = "train"; table.to_csv(root/"manifest.csv", index=False)
    assert not load_radiographs("folder", "lungs", root, 32, cache_dir=tmp_path/"cache").faults     # on one side


@pytest.mark.parametrize("spot", [40, -6, -2000])
def test_14_15_a_damaged_gzip_file_is_named(tmp_path, spot):
    write_nih(tmp_path/"nih", MANY, packed=True)
    file = tmp_path/"nih"/"Data_Entry_2017.csv.gz"
    content = bytearray(file.read_bytes()); content[spot] ^= 255; file.write_bytes(content)
    with pytest.raises(ValueError, match="Data_Entry_2017.csv.gz"): plan_pairs(tmp_path/"nih", ["Effusion|Edema"])


def npz(path):
    with open(path, "wb") as file: np.savez(file, oval("LL", 50))
def giant(path):
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, dict(descr="<f8", fortran_order=False, shape=(10**10, 2)))
def torn(path): path.write_bytes(path.read_bytes()[:100])
def empty(path): path.write_bytes(b"")
def pickled(path): np.save(path, np.array([{}, 1], object))


@pytest.mark.parametrize("spoiled", [npz, giant, torn, empty, pickled])
def test_14_15_a_contour_that_is_something_else_is_named(tmp_path, spoiled):
    write_landmark(tmp_path/"lm", {"JSRT": 30})
    spoiled(tmp_path/"lm"/"landmarks"/"LL"/"JPCNN008.npy")
    with pytest.raises(ValueError, match="clinical.csv row 9: contour 'landmarks/LL/JPCNN008.npy' cannot be read"):
        load_radiographs("landmark", "lungs", tmp_path/"lm", 32, cache_dir=tmp_path/"cache")
    rest = load_radiographs("landmark", "lungs", tmp_path/"lm", 32, cache_dir=tmp_path/"cache", on_error="skip")
    assert len(rest) == 29 and len(rest.faults) == 1


@pytest.mark.parametrize("text,said", [("value,structure\n" + "9"*5000 + ",lungs\n", "legend.csv row 2: value '9999"),
                                       ("value,structure\n1.0,lungs\n", "legend.csv row 2: value '1.0'"),
                                       ("value,structure\n1,\n", "legend.csv row 2: value '1'"),
                                       ("value,structure\n1\n", "legend.csv row 2 has 1 fields"),
                                       ("value;structure\n1;lungs\n", "legend.csv: column value is there 0 times"),
                                       ("", "legend.csv: column value is there 0 times"),
                                       ("value,structure\n1,lungs\xff\n", "legend.csv is not a table in UTF-8")])
def test_14_15_a_wrong_legend_is_named(mine, text, said):
    root, table = mine
    table.drop(columns=["lungs", "heart"]).assign(label_map="maps/0.png").to_csv(root/"manifest.csv", index=False)
    (root/"legend.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(said)): load_radiographs("folder", "lungs", root, 32)


@pytest.mark.parametrize("how", ["phantom", "folder", "many patients", "few patients", "official"])
def test_14_10_a_pair_is_split_alike_in_either_order(mine, tmp_path, how):
    options = dict(size=32, cache_dir=tmp_path/"cache")
    if how == "phantom": options |= dict(dataset="phantom", phantoms=40)
    elif how == "folder": options |= dict(dataset="folder", data_dir=mine[0])
    else:
        names = write_nih(tmp_path/"nih", MANY[:112] if how == "few patients" else MANY)
        options |= dict(dataset="chestxray14", data_dir=tmp_path/"nih", split="official" if how == "official" else "random")
        (tmp_path/"nih"/"test_list.txt").write_text("\n".join(names[-60:]))
        (tmp_path/"nih"/"train_val_list.txt").write_text("\n".join(names[:-60]))
    one, other = (load_radiographs(task=task, **options) for task in ("Effusion|Edema", "Edema|Effusion"))
    assert dict(zip(one.table.image_id, one.table["split"])) == dict(zip(other.table.image_id, other.table["split"]))
    assert (one.images == other.images).all() and (one.targets == 1 - other.targets).all()


def test_14_10_both_orders_agree_in_every_cohort():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        patient = np.repeat([f"p{i}" for i in range(200)], np.minimum(rng.geometric(.35, 200), 30))
        label = (rng.random(len(patient)) < rng.choice([.2, .5, .8])).astype(int)
        assert (split_classes(patient, label, seed)[0] == split_classes(patient, 1 - label, seed)[0]).all()


def test_14_10_labels_in_another_case_get_a_hint(mine):
    root, table = mine
    with pytest.raises(ValueError, match="no image is labelled 'EFFUSION'; .*Did you mean 'Effusion'?"):
        load_radiographs("folder", "EFFUSION|EDEMA", root, 32)
    edit("labels", "EDEMA")(root, table); table.to_csv(root/"manifest.csv", index=False)
    with pytest.raises(ValueError, match="row 6: unknown label 'EDEMA'. Did you mean 'Edema'?"):
        load_radiographs("folder", "Effusion|Edema", root, 32)


def test_14_10_left_out_tells_images_on_disk_apart(tmp_path):
    names = write_nih(tmp_path/"nih", MANY)
    for name in names[:12]: (tmp_path/"nih"/"images"/name).unlink()                 # three images of each kind of label
    data = load_radiographs("chestxray14", "Effusion|Edema", tmp_path/"nih", 32, cache_dir=tmp_path/"cache")
    both, neither = "shows both Effusion and Edema", "shows neither"
    gone = pd.Series([labels for _, labels in MANY[:12]]).value_counts()
    assert data.left_out == {"not on disk": gone["Effusion"] + gone["Edema"], f"{both}, not on disk": gone["Edema|Effusion"],
                             f"{neither}, not on disk": gone["Mass"], both: 60 - gone["Edema|Effusion"],
                             neither: 60 - gone["Mass"]}
    assert sum(data.left_out.values()) + len(data) == len(MANY) and len(data.missing) == data.left_out["not on disk"]


def test_all_kinds_of_files_give_the_same_image(mine, tmp_path):
    root, table = mine
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset
    def dicom(path, pixels, photometric):
        ds = Dataset(); ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", pydicom.uid.generate_uid()
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *pixels.shape, 1, photometric
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.PixelData = pixels.astype("<u2").tobytes(); ds["PixelData"].VR = "OW"
        ds.save_as(path, enforce_file_format=True)
    ways = "percentile", "min-max"
    plain = {how: load_radiographs("folder", "lungs", root, 48, normalise=how, cache_dir=tmp_path/"cache").images.copy() for how in ways}
    for i in range(40):
        image, path = np.asarray(Image.open(root/"images"/f"{i}.png")).astype(np.uint16), root/"images"/f"{i}"
        if i % 5 == 0: dicom(path.with_suffix(".dcm"), image*16, "MONOCHROME2"); end = "dcm"
        if i % 5 == 1: dicom(path.with_suffix(".dcm"), 4095 - image*16, "MONOCHROME1"); end = "dcm"
        if i % 5 == 2: Image.fromarray(image*257).save(path.with_suffix(".tif")); end = "tif"
        if i % 5 == 3: Image.fromarray(image*16).save(path.with_suffix(".16.png")); end = "16.png"
        if i % 5 == 4:
            Image.fromarray(image.astype(np.uint8)).convert("RGB").save(path.with_suffix(".rgb.png")); end = "rgb.png"
        table.loc[i, "image"] = f"images/{i}.{end}"
    table.to_csv(root/"manifest.csv", index=False)
    for how in ways:
        data = load_radiographs("folder", "lungs", root, 48, normalise=how, cache_dir=tmp_path/"cache")
        assert np.abs(data.images.astype(int) - plain[how]).max() <= 1
    with pytest.raises(ValueError, match="row 5: image 'images/3.16.png' cannot be used: uses 12 of its 16 bits"):
        load_radiographs("folder", "lungs", root, 48, normalise="none", cache_dir=tmp_path/"cache")


def test_label_maps_with_a_legend(mine, tmp_path):
    root, table = mine
    apart = load_radiographs("folder", "lungs_heart", root, 32, cache_dir=tmp_path/"cache")
    table = table.drop(columns=["lungs", "heart"]).assign(label_map=[f"maps/{i}.png" for i in range(40)])
    table.to_csv(root/"manifest.csv", index=False)
    with pytest.raises(FileNotFoundError, match="legend.csv is not there"): load_radiographs("folder", "lungs", root, 32)
    (root/"legend.csv").write_text("value,structure\n1,lungs\n3,heart\n")
    mapped = load_radiographs("folder", "lungs_heart", root, 32, cache_dir=tmp_path/"cache")
    assert (mapped.targets == apart.targets).all() and set(mapped.table.sex) == {"M", "F"}
    (root/"legend.csv").write_text("value,structure\n1,lungs\n")
    with pytest.raises(ValueError, match="row 2: lungs mask 'maps/0.png' cannot be used: holds the label 3"):
        load_radiographs("folder", "lungs", root, 32, cache_dir=tmp_path/"cache")
    (root/"legend.csv").write_text("value,structure\n1,lungs\n1,heart\n")
    with pytest.raises(ValueError, match="legend.csv row 3: value '1'"): load_radiographs("folder", "lungs", root, 32)


# ---- a data set, and a task, from outside

@pytest.fixture
def plugin():
    "Register entries for one test."
    def register(**fields):
        return DATASETS.register(Dataset("plugin", **fields))
    yield register
    DATASETS.pop("plugin", None)


def listing(root):
    "Find images and masks by their names, as a user's manifest would."
    names = sorted(file.name for file in (root/"images").glob("*.png"))
    return pd.DataFrame([dict(image=f"images/{n}", patient_id=int(Path(n).stem)//2, lungs=f"lungs/{n}", clavicles=f"heart/{n}",
                              labels=["Edema", "Mass|Edema", "No Finding", ""][int(Path(n).stem) % 4]) for n in names])


def test_a_manifest_from_outside_is_decoded_split_and_checked_as_all_others(mine, plugin, tmp_path):
    root, _ = mine
    plugin(manifest=listing)
    data = load_radiographs("plugin", "lungs", root, 48, cache_dir=tmp_path/"cache")
    assert data.name == "plugin" and len(data) == 40 and data.table.patient_id.nunique() == 20
    assert data.table.groupby("patient_id")["split"].nunique().max() == 1 and set(data.table["split"]) == set(SPLITS)
    truncate(root/"images"/"7.png")
    with pytest.raises(ValueError, match=r"plugin row \d+: image 'images/7.png' cannot be used: is damaged"):
        load_radiographs("plugin", "lungs", root, 48, cache_dir=tmp_path/"cache")
    rest = load_radiographs("plugin", "lungs", root, 48, cache_dir=tmp_path/"cache", on_error="skip")
    assert len(rest) == 39 and len(rest.faults) == 1 and "images/7.png" not in set(rest.table.image_id)


def test_a_task_from_outside_finds_its_column(mine, plugin, tmp_path):
    root, _ = mine
    plugin(manifest=listing)
    task = Segmentation("clavicles_lungs", ("clavicles", "lungs"))
    data = load_radiographs("plugin", task, root, 48, cache_dir=tmp_path/"cache")
    masks = [[np.asarray(Image.open(root/kind/Path(name).name)) > 0 for kind in ("heart", "lungs")] for name in data.table.image_id]
    assert data.outputs == ("clavicles", "lungs") and (data.targets == np.array(masks)).all()
    with pytest.raises(ValueError, match="task 'ribs' needs a column 'ribs' with masks"):
        load_radiographs("plugin", Segmentation("ribs", ("ribs",)), root, 48)


def test_several_findings_come_from_the_labels(mine, plugin, tmp_path):
    root, _ = mine
    plugin(manifest=listing)
    task = Findings("two", ("Edema", "Mass"))
    data = load_radiographs("plugin", task, root, 48, cache_dir=tmp_path/"cache")
    wanted = {0: [1, 0], 1: [1, 1], 2: [0, 0]}
    assert data.left_out == {"no labels": 10} and data.targets.shape == (30, 2)
    assert [wanted[int(Path(name).stem) % 4] for name in data.table.image_id] == data.targets.tolist()


@pytest.mark.parametrize("how", ["entry", "option"])
def test_a_data_set_for_testing_needs_no_other_split(mine, plugin, tmp_path, how):
    root, _ = mine
    plugin(manifest=lambda folder: listing(folder).iloc[:2].assign(split="train"), testing_only=how == "entry")
    data = load_radiographs("plugin", "lungs", root, 48, cache_dir=tmp_path/"cache", test_only=how == "option")
    assert data.table["split"].tolist() == ["test", "test"]
    one_class = load_radiographs("plugin", Findings("edema", ("Edema",)), root, 48, cache_dir=tmp_path/"cache", test_only=True)
    assert one_class.targets.tolist() == [[1], [1]]


def test_options_that_a_data_set_does_not_use_are_refused_where_they_would_mean_something(tmp_path):
    for name, value in (("data_dir", tmp_path), ("source", "JSRT")):
        with pytest.raises(ValueError, match=f"data set 'phantom' has no {name}, got"): load_radiographs(**{name: value})
    with pytest.raises(ValueError, match="split 'official' is not one of random, whole for phantom"): load_radiographs(split="official")
    with pytest.raises(ValueError, match="normalise 'minmax' is not one of .*Did you mean 'min-max'?"):
        load_radiographs(normalise="minmax")


def test_left_and_right_lung_in_two_files_are_united(mine, plugin, tmp_path):
    root, _ = mine
    whole = load_radiographs("folder", "lungs", root, 48, cache_dir=tmp_path/"cache").targets.copy()
    for side, part in (("left", slice(24)), ("right", slice(24, None))):
        (root/side).mkdir()
        for i in range(40):
            half = np.zeros((48, 48), np.uint8); half[:, part] = np.asarray(Image.open(root/"lungs"/f"{i}.png"))[:, part]
            Image.fromarray(half).save(root/side/f"{i}.png")
    keep = [i for i in range(40) if all(np.asarray(Image.open(root/side/f"{i}.png")).any() for side in ("left", "right"))]
    plugin(manifest=lambda folder: pd.DataFrame([dict(image=f"images/{i}.png", patient_id=i, lungs=f"left/{i}.png|right/{i}.png")
                                                 for i in keep]))
    halves = load_radiographs("plugin", "lungs", root, 48, cache_dir=tmp_path/"cache")
    assert len(keep) > 20 and (halves.targets == whole[keep]).all()


# ---- the store

def test_a_changed_file_is_read_again_and_another_choice_is_another_store(mine, tmp_path):
    root, _ = mine
    first = load_radiographs("folder", "lungs", root, 32, cache_dir=tmp_path/"cache")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48)).astype(np.uint8)).save(root/"images"/"7.png")
    changed = load_radiographs("folder", "lungs", root, 32, cache_dir=tmp_path/"cache")
    differs = [i for i in range(40) if (first.images[i] != changed.images[i]).any()]
    assert [first.table.image_id[i] for i in differs] == ["images/7.png"] and changed.data_hash != first.data_hash
    for how in ("percentile", "none"): load_radiographs("folder", "lungs", root, 32, normalise=how, cache_dir=tmp_path/"cache")
    assert len(list((tmp_path/"cache").glob("[!.]*"))) == 4


# ---- description

def test_a_reencoded_copy_is_found_and_different_radiographs_are_not(mine, tmp_path):
    root, table = mine
    made = phantom(24, size=96)
    for i in range(24): Image.fromarray(made.images[i]).save(root/"images"/f"{i}.png")
    for i in range(24): Image.fromarray(made.lungs[i]*255).save(root/"lungs"/f"{i}.png")
    Image.fromarray(made.images[3]).save(root/"images"/"24.jpg", quality=70)
    Image.fromarray(made.images[5]).save(root/"images"/"25.png")
    table = table.iloc[:26].copy(); table.loc[24, ["image", "lungs"]] = ["images/24.jpg", "lungs/3.png"]
    table.loc[25, "lungs"] = "lungs/5.png"
    table.to_csv(root/"manifest.csv", index=False)
    data = load_radiographs("folder", "lungs", root, 96, cache_dir=tmp_path/"cache")
    found = leakage(data).set_index("kind")
    assert set(found.index) == {"identical", "nearly identical"} and len(found) == 2
    assert set(found.loc["nearly identical", ["image_id 1", "image_id 2"]]) == {"images/3.png", "images/24.jpg"}
    assert set(found.loc["identical", ["image_id 1", "image_id 2"]]) == {"images/5.png", "images/25.png"}
    assert leakage_summary(leakage(data))["of different patients"].tolist() == [0, 1, 1]
    assert cohort_table(data).images.iloc[-1] == 26
