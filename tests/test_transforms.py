"What the transforms do in loaders with processes of their own, in peers' pipelines, and on a GPU."
import importlib.util, json, pickle, sys, warnings
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torchvision import tv_tensors
from torchvision.transforms import v2

from cxr_noise_study.channel import corrupt
from cxr_noise_study.noise import LADDER, SOURCES, Severity, Source
from cxr_noise_study.transforms import RadiographicNoise, RandRadiographicNoise, RandRadiographicNoised, as_albumentations

GREY = torch.arange(48*64, dtype=torch.uint8).reshape(48, 64)


class Samples(torch.utils.data.Dataset):
    "Twelve times the same image under different names, through any transform of dictionaries."
    def __init__(self, transform): self.transform = transform
    def __len__(self): return 12
    def __getitem__(self, k):
        return self.transform({"mask": GREY[None] > 99, "image": GREY[None], "image_id": f"{k}.png"})


def load(transform, **options):
    torch.manual_seed(3)
    batches = [batch for batch in torch.utils.data.DataLoader(Samples(transform), **options)]
    assert all((batch["mask"] == (GREY > 99)).all() for batch in batches)
    return torch.cat([batch["image"] for batch in batches])


def test_workers():
    "By name workers change nothing, without a seed they repeat nothing; the transform goes through pickle on its way."
    options = dict(num_workers=2, batch_size=3)
    by_name = pickle.loads(pickle.dumps(RadiographicNoise(severities=LADDER[1:], seed=1)))
    expected = load(by_name, batch_size=5)
    assert (load(by_name, **options) == expected).all()
    for k in range(12):
        name = f"{k}.png"
        assert torch.equal(expected[k], corrupt(GREY[None], by_name.severity_of(name), [name], seed=1))
    fresh = load(pickle.loads(pickle.dumps(RadiographicNoise((1, 3), (1, 3)))), **options)
    assert len({image.numpy().tobytes() for image in fresh}) == 12


@settings(max_examples=60, deadline=None)
@given(lead=st.lists(st.integers(0, 3), max_size=2), channels=st.sampled_from([None, 1, 3]), h=st.integers(1, 9),
       w=st.integers(1, 9), kind=st.sampled_from(["plain", "marked", "strided"]),
       dtype=st.sampled_from([torch.uint8, torch.uint16, torch.float32, torch.float16]))
def test_any_layout(lead, channels, h, w, kind, dtype):
    "Whatever the layout, the shape, type and dtype stay, severity 0 is the identity, and channels stay alike."
    shape = ((*lead, channels) if channels else ()) + (h, w)
    plane = torch.linspace(0, 1, h*w).reshape(h, w)
    plane = plane.to(dtype) if dtype.is_floating_point else (plane*torch.iinfo(dtype).max).to(torch.int32).to(dtype)
    image = plane.expand(shape) if kind == "strided" else plane.expand(shape).contiguous()
    image = tv_tensors.Image(image) if kind == "marked" else image
    for transform in (RadiographicNoise(), RadiographicNoise(3, 1)):
        noisy = transform(image)
        assert (type(noisy), noisy.dtype) == (type(image), image.dtype)
        assert noisy.shape == (image.shape if kind != "marked" else tv_tensors.Image(image).shape)
        if not any(transform.strengths.values()): assert torch.equal(noisy, image)
        if channels == 3 and noisy.numel(): assert torch.equal(noisy[..., 0, :, :], noisy[..., 2, :, :])


@settings(max_examples=30, deadline=None)
@given(s_q=st.floats(0, 20), s_e=st.floats(0, 20), split=st.integers(0, 5), seed=st.integers(0, 2**40),
       replicate=st.integers(0, 9))
def test_any_split(s_q, s_e, split, seed, replicate):
    "A batch in two parts gives the fields of the whole batch."
    noise, ids = RadiographicNoise(s_q, s_e, seed=seed, replicate=replicate), list("abcde")
    batch = GREY[:8, :8].expand(5, 1, 8, 8)
    parts = [noise(batch[a:b], image_id=ids[a:b]) for a, b in ((0, split), (split, 5))]
    assert torch.equal(torch.cat(parts), noise(batch, image_id=ids))


def tilt(intensity, s, rng): return intensity + .1*s*rng.standard_normal()*np.linspace(-1, 1, intensity.shape[1])


def test_a_registered_source_in_workers(monkeypatch):
    "A field that varies over the image: one for all channels, by name, in workers as without them."
    monkeypatch.setitem(SOURCES, "tilt", Source("tilt", 30, "s is 10 times the SD of a left-right gradient", tilt))
    noise = RadiographicNoise(tilt=(1, 3), quantum=4, seed=0)
    assert (load(noise, num_workers=2, batch_size=3) == load(noise, batch_size=12)).all()
    for image in (GREY[None], GREY[None]/255):
        noisy = noise(image.expand(3, 48, 64), image_id="a")
        assert torch.equal(noisy[0], noisy[2]) and not torch.equal(noisy, image.expand(3, 48, 64))
    regime = RadiographicNoise("0.5*clean+0.5*tilt=2", seed=0)
    changed = [not torch.equal(regime(GREY[None], image_id=k), GREY[None]) for k in range(60)]
    assert changed == [bool(regime.severity_of(k)) for k in range(60)] and 10 < sum(changed) < 50


def test_random_apply_and_nested_samples():
    sample = (GREY[None], {"boxes": torch.zeros(2, 4), "masks": tv_tensors.Mask(GREY[None]), "prior": GREY[None]})
    image, rest = v2.RandomApply([RadiographicNoise(4)], p=1)(sample)
    assert (image != GREY).any() and all((rest[key] == sample[1][key]).all() for key in rest)
    assert (v2.RandomApply([RadiographicNoise(4)], p=0)(GREY[None]) == GREY).all()


def test_monai_pipeline(tmp_path):
    from monai.data import DataLoader, Dataset
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandRotate90d, ScaleIntensityRanged
    from PIL import Image
    files = []
    for k in range(4):
        Image.fromarray(GREY.numpy()).save(tmp_path/f"{k}.png")
        files.append({"image": str(tmp_path/f"{k}.png"), "label": str(tmp_path/f"{k}.png"), "image_id": f"{k}.png"})
    keys  = ["image", "label"]
    steps = [LoadImaged(keys, reverse_indexing=False), EnsureChannelFirstd(keys),
             ScaleIntensityRanged("image", 0, 255, 0, 1)]
    clean = GREY[None]/255
    for noise in (RandRadiographicNoised("image", (2, 4)), RadiographicNoise(4, seed=0)):
        dataset = Dataset(files, Compose([*steps, noise]))
        batches = [list(DataLoader(dataset, batch_size=2, num_workers=n)) for n in (0, 2)]
        images  = [torch.cat([b["image"].as_tensor() for b in run]) for run in batches]
        assert len({image.numpy().tobytes() for image in images[1]}) == 4
        assert all((b["label"].as_tensor() == GREY).all() for run in batches for b in run)
        if isinstance(noise, RadiographicNoise):
            assert torch.equal(*images) and (images[0][2] == noise(clean, image_id="2.png")).all()


@pytest.mark.skipif(importlib.util.find_spec("albumentations") is None, reason="needs albumentations (extra peers)")
def test_albumentations_in_workers():
    import albumentations as A
    step = A.Compose([as_albumentations(RadiographicNoise((1, 3), 1))])
    fresh = load(Albumented(step), num_workers=2, batch_size=3)
    assert len({image.numpy().tobytes() for image in fresh}) == 12
    half = A.Compose([as_albumentations(RadiographicNoise(4), p=.5)])
    changed = sum((half(image=GREY.numpy())["image"] != GREY.numpy()).any() for _ in range(200))
    assert 50 < changed < 150          # binomial(200, ½): beyond ±50 once in 10¹² runs


class Albumented:
    "An albumentations pipeline as a transform of dictionaries with channel-first tensors."
    def __init__(self, step): self.step = step
    def __call__(self, sample):
        result = self.step(image=sample["image"][0].numpy(), mask=sample["mask"][0].numpy().astype(np.uint8))
        return {"image": torch.from_numpy(result["image"])[None], "mask": torch.from_numpy(result["mask"])[None].bool()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_gpu_gives_the_same_noise(dtype):
    image = GREY.expand(4, 3, 48, 64).to(dtype)/(255 if dtype == torch.float32 else 1)
    image, noise = image.to(dtype), RadiographicNoise(severities=LADDER, seed=0)
    noisy = noise(image.cuda(), image_id=list("abcd"))
    assert noisy.is_cuda and torch.equal(noisy.cpu(), noise(image, image_id=list("abcd")))


# ---- as each library expects its transforms

def test_14_6_torchvision_chooses_by_key():
    clean = GREY[None]
    for sample in ({"clean": clean, "image": clean}, {"image": clean, "clean": clean}):
        noisy = RadiographicNoise(4)(sample)
        assert list(noisy) == list(sample) and (noisy["image"] != clean).any() and noisy["clean"] is clean
    image, label = RadiographicNoise(4, seed=0)({"mask": clean, "image": clean, "image_id": "a"}, 3)
    assert torch.equal(image["image"], corrupt(clean, Severity(4), ["a"])) and label == 3 and image["mask"] is clean


def test_14_6_torchvision_names_by_image_id():
    "One name for a sample with several images; each of them has a field of its own, the image that of its name."
    noise, marked = RadiographicNoise(4, seed=0), tv_tensors.Image(GREY[None])
    noisy = noise({"prior": marked, "image": marked, "image_id": "a"})
    assert torch.equal(noisy["image"], corrupt(GREY[None], Severity(4), ["a"]))
    assert torch.equal(noisy["prior"], corrupt(GREY[None], Severity(4), ["a/prior"]))
    batch = noise({"image": tv_tensors.Image(GREY.expand(2, 1, 48, 64)), "prior": tv_tensors.Image(GREY.expand(2, 1, 48, 64)),
                   "image_id": ["a", "b"]})
    assert torch.equal(batch["image"][0], noisy["image"]) and torch.equal(batch["prior"][0], noisy["prior"])
    ranges = RadiographicNoise((1, 9), seed=0)
    for name, spelt in ((7, np.int64(7)), (7, torch.tensor(7)), ("a", np.str_("a"))):
        assert torch.equal(*(ranges({"image": GREY[None], "image_id": n})["image"] for n in (name, spelt)))


def test_14_6_torchvision_named_tuples_lists_and_videos():
    "No noise on a mask that stands first, none on a plain tensor beside a video, and some on every image of a list."
    clean, frames = GREY[None], GREY.expand(3, 1, 48, 64)
    noisy = RadiographicNoise(4)(namedtuple("Sample", "mask image")(clean, clean))
    assert noisy.mask is clean and (noisy.image != clean).any()
    video, mask = RadiographicNoise(4, seed=0)((tv_tensors.Video(frames), clean), image_id=list("abc"))
    assert mask is clean and type(video) is tv_tensors.Video and torch.equal(video[1], corrupt(clean, Severity(4), ["b"]))
    views = RadiographicNoise(4)({"mask": clean, "image": [clean, clean]})
    assert views["mask"] is clean and all((view != clean).any() for view in views["image"])


def test_14_6_one_severity_however_a_number_is_spelt():
    ranges = RadiographicNoise((1, 9), seed=3, replicate=2)
    for number in (np.int64, np.uint8, torch.tensor):
        again = RadiographicNoise((1, 9), seed=number(3), replicate=number(2))
        assert again.severity_of(number(7)) == ranges.severity_of(7) and str(again) == str(ranges)
    for seed in (.5, "a", True):
        with pytest.raises(ValueError, match="seed must be int"): RadiographicNoise(4, seed=seed)
    with pytest.raises(ValueError, match="quantum must not be given beside"): RadiographicNoise(4, quantum=2)


def test_14_6_torchvision_compiles_and_takes_any_memory():
    pipeline = v2.Compose([RadiographicNoise(4), v2.ToDtype(torch.float32, scale=True)])
    first, second = (torch.compile(pipeline, backend="eager")(GREY[None]) for _ in range(2))
    assert first.dtype == torch.float32 and not torch.equal(first, second)
    fixed = GREY.numpy().copy()
    fixed.setflags(write=False)
    with warnings.catch_warnings(action="error"): assert (RadiographicNoise(4)(fixed) != fixed).any()
    assert RadiographicNoise(4)(torch.zeros(1, 0, 8)).shape == (1, 0, 8)


@pytest.mark.parametrize("kind", ["array", "dictionary"])
def test_14_6_monai_random_transforms(kind):
    "What MONAI's own tests ask of RandGaussianNoise and RandGaussianNoised."
    from monai.data import MetaTensor
    from monai.transforms import Compose, MapTransform, RandomizableTransform
    def make(**more): return RandRadiographicNoise(4, 1, **more) if kind == "array" else RandRadiographicNoised("image", 4, 1, **more)
    def give(transform, image): return transform(image) if kind == "array" else transform({"image": image, "label": 5})["image"]
    assert isinstance(make(), RandomizableTransform) and isinstance(make(), MapTransform) == (kind == "dictionary")
    chest = GREY[None].numpy()
    first = [np.asarray(give(make().set_random_state(0), f(chest))) for f in (np.array, torch.from_numpy, MetaTensor)]
    assert all((other == first[0]).all() for other in first) and (first[0] != chest).any() and first[0].shape == chest.shape
    transform = make()
    runs = [[np.asarray(give(transform, chest)) for _ in range(3)] for _ in range(2) if transform.set_random_state(7)]
    assert (np.array(runs[0]) == np.array(runs[1])).all() and len({x.tobytes() for x in runs[0]}) == 3
    pipeline = Compose([make()])
    assert len({np.asarray(give(pipeline.set_random_state(3), chest)).tobytes() for _ in range(2)}) == 1
    assert (np.asarray(give(make(prob=0), chest)) == chest).all()
    half = make(prob=.5).set_random_state(0)
    assert 50 < sum((np.asarray(give(half, chest)) != chest).any() for _ in range(200)) < 150   # beyond: once in 10¹² seeds
    three = np.asarray(give(make(), np.repeat(chest, 3, 0)))
    assert (three[0] == three[2]).all()
    deep = np.asarray(give(make(), (chest/255).astype(np.float32)))
    assert deep.dtype == np.float32 and 0 <= deep.min() and deep.max() <= 1
    again = pickle.loads(pickle.dumps(make().set_random_state(0)))
    assert (np.asarray(give(again, chest)) == first[0]).all()


def test_14_6_monai_keys():
    data = {"image": GREY[None], "prior": GREY[None], "label": GREY[None], "image_id": "a"}
    noisy = RandRadiographicNoised(["image", "prior"], 4)(data)
    assert (noisy["image"] != noisy["prior"]).any() and noisy["label"] is data["label"] and (data["image"] == GREY).all()
    with pytest.raises(KeyError): RandRadiographicNoised("scan", 4)(data)
    assert RandRadiographicNoised("scan", 4, allow_missing_keys=True)(data)["image"] is data["image"]


def test_14_6_monai_contract():
    "Back ends, arrays of 16 bit in any byte order, and one line where a call or a seed comes too early."
    from monai.transforms import RandGaussianNoise
    assert RandRadiographicNoise.backend == RandRadiographicNoised.backend == RandGaussianNoise.backend
    deep = GREY[None].numpy().astype(np.uint16)*257
    noisy = [RandRadiographicNoise(4).set_random_state(0)(deep.astype(kind)) for kind in ("<u2", ">u2")]
    assert noisy[0].dtype == torch.uint16 and torch.equal(*noisy)
    with pytest.raises(RuntimeError, match="call randomize"): RandRadiographicNoise(4)(deep, randomize=False)
    with pytest.raises(ValueError, match="set_random_state in MONAI, got seed=1"): RandRadiographicNoised("image", 4, seed=1)


def test_14_6_monai_with_the_loader_of_pytorch():
    "It seeds no state of MONAI: two epochs of two workers give 24 fields and 24 draws of the probability all the same."
    def epochs(prob=1.):
        torch.manual_seed(3)
        loader = torch.utils.data.DataLoader(Samples(RandRadiographicNoised("image", 4, prob=prob)), num_workers=2)
        return [np.asarray(batch["image"]) for _ in range(2) for batch in loader]
    assert len({noisy.tobytes() for noisy in epochs()}) == 24
    clean = [(noisy == GREY.numpy()).all() for noisy in epochs(.5)]
    assert clean[:12] != clean[12:] and clean[:12:2] != clean[1:12:2]         # alike by chance once in 60 runs; seeded


@pytest.mark.parametrize("kind,workers", [("plain", 0), ("cache", 0), ("persistent", 0), ("cache", 2)])
def test_14_6_monai_data_sets_give_fresh_noise(tmp_path, kind, workers):
    "Three epochs of one loader, then three new loaders: 6 × 2 different fields, over a clean image that is kept."
    from monai.data import CacheDataset, DataLoader, Dataset, PersistentDataset
    from monai.transforms import Compose, ScaleIntensityRanged
    items = [{"image": GREY[None].float(), "label": k} for k in range(2)]
    steps = Compose([ScaleIntensityRanged("image", 0, 255, 0, 1), RandRadiographicNoised("image", (2, 4))])
    dataset = {"plain": lambda: Dataset(items, steps), "cache": lambda: CacheDataset(items, steps, progress=False),
               "persistent": lambda: PersistentDataset(items, steps, cache_dir=tmp_path)}[kind]()
    one = DataLoader(dataset, num_workers=workers)
    batches = [batch["image"] for loader in (one, one, one, *(DataLoader(dataset, num_workers=workers) for _ in "abc"))
               for batch in loader]
    assert len({np.asarray(batch).tobytes() for batch in batches}) == 12


albumentations = pytest.mark.skipif(importlib.util.find_spec("albumentations") is None, reason="needs albumentations")


@albumentations
@pytest.mark.parametrize("noise", [RadiographicNoise((1, 3), 1), RadiographicNoise(severities=LADDER),
                                   RadiographicNoise("0.5*clean+0.5*0..9,0"), RadiographicNoise(Severity(4, 2))], ids=str)
def test_14_6_albumentations_saves_and_replays(noise):
    import albumentations as A
    step = as_albumentations(noise)
    assert isinstance(step, A.ImageOnlyTransform) and type(step).__module__ == "cxr_noise_study.transforms"
    pipeline = A.Compose([A.HorizontalFlip(p=.5), step], seed=3)
    saved = json.loads(json.dumps(A.to_dict(pipeline)))
    outputs = []
    for again in (pipeline, A.from_dict(saved), pickle.loads(pickle.dumps(pipeline))):
        again.set_random_seed(3)
        outputs.append([again(image=GREY.numpy())["image"] for _ in range(4)])
    assert (np.array(outputs[0]) == np.array(outputs[1])).all() and (np.array(outputs[0]) == np.array(outputs[2])).all()
    replayed = A.ReplayCompose([step])
    first = replayed(image=GREY.numpy())
    assert (A.ReplayCompose.replay(first["replay"], image=GREY.numpy())["image"] == first["image"]).all()


@albumentations
def test_14_6_albumentations_knows_its_targets():
    import albumentations as A
    pipeline, grey = A.Compose([as_albumentations(RadiographicNoise(4))], seed=1, additional_targets={"prior": "image"}), GREY.numpy()
    result = pipeline(image=grey, prior=grey, mask=grey)
    assert (result["image"] != grey).any() and (result["prior"] != grey).any() and (result["mask"] == grey).all()
    slices = A.Compose([as_albumentations(RadiographicNoise(4))], seed=1)(volume=np.stack([grey]*3))["volume"]
    assert slices.shape == (3, 48, 64) and len({s.tobytes() for s in slices}) == 3       # no two slices alike
    batch = A.Compose([as_albumentations(RadiographicNoise(4))], seed=1)(images=np.stack([grey[..., None]]*3))["images"]
    assert batch.shape == (3, 48, 64, 1) and (batch[..., 0] == slices).all()
    runs = [A.Compose([as_albumentations(RadiographicNoise(4))], seed=s)(image=grey)["image"] for s in (1, 1, 2)]
    assert (runs[0] == runs[1]).all() and (runs[0] != runs[2]).any()


@albumentations
def test_14_6_albumentations_gives_no_two_images_one_field():
    import albumentations as A
    def step(): return as_albumentations(RadiographicNoise(4))
    grey = GREY.numpy()
    pipeline = A.ReplayCompose([step()], additional_targets={"prior": "image", "second": "mask"})
    result = pipeline(image=grey, prior=grey, second=grey)
    assert (result["image"] != result["prior"]).any() and (result["second"] == grey).all()
    again = A.ReplayCompose.replay(result["replay"], image=grey, prior=grey)
    assert all((again[key] == result[key]).all() for key in ("image", "prior"))
    volumes = A.Compose([step()])(volumes=np.broadcast_to(grey, (2, 3, 48, 64)).copy())["volumes"]
    assert volumes.shape == (2, 3, 48, 64) and len({field.tobytes() for volume in volumes for field in volume}) == 6
    fixed = grey.copy()
    fixed.setflags(write=False)
    with warnings.catch_warnings(action="error"): assert (A.Compose([step()])(image=fixed)["image"] != fixed).any()


def test_14_6_without_albumentations_there_is_one_line(monkeypatch):
    from cxr_noise_study import transforms
    monkeypatch.setitem(sys.modules, "albumentations", None)
    transforms._albumentations_class.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'cxr_noise_study\[peers\]'"): as_albumentations(RadiographicNoise(4))
    transforms._albumentations_class.cache_clear()
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"): transforms.Nothing
