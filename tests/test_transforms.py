"What the transforms do in loaders with processes of their own, in peers' pipelines, and on a GPU."
import importlib.util, pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torchvision import tv_tensors
from torchvision.transforms import v2

from cxr_noise_study.channel import corrupt
from cxr_noise_study.noise import LADDER, SOURCES, Severity, Source
from cxr_noise_study.transforms import RadiographicNoise, as_albumentations

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
    from monai.transforms import Compose, EnsureChannelFirstd, Lambdad, LoadImaged, RandRotate90d, ScaleIntensityRanged
    from PIL import Image
    files = []
    for k in range(4):
        Image.fromarray(GREY.numpy()).save(tmp_path/f"{k}.png")
        files.append({"image": str(tmp_path/f"{k}.png"), "label": str(tmp_path/f"{k}.png"), "image_id": f"{k}.png"})
    keys  = ["image", "label"]
    steps = [LoadImaged(keys, reverse_indexing=False), EnsureChannelFirstd(keys),
             ScaleIntensityRanged("image", 0, 255, 0, 1)]
    clean = GREY[None]/255
    for noise in (Lambdad("image", RadiographicNoise((2, 4))), RadiographicNoise(4, seed=0)):
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
