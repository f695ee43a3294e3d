"Explanations of bad input, of networks of others, and of real radiographs where they are at hand."
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from torch import nn

from cxr_noise_study.evaluation import own_data
from cxr_noise_study.explanations import (annotated_regions, draw_boxes, explain, explain_under_noise, explanation_summary,
                                          move_order, nih_boxes)
from cxr_noise_study.networks import build_model
from cxr_noise_study.tasks import METRICS, Metric

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8)


def small(outputs=1, **options):
    "A convolutional classifier with random weights."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                             nn.Linear(4, outputs))


@pytest.mark.parametrize("model, options, message", [
    (small(), dict(layer="features"), "layer 'features' gives no maps"),
    (small(), dict(layer="4"), "layer '4' gives no maps"),
    (small(), dict(output=1), "got 1 for outputs (3, 1)"),
    (small(), dict(output=-1), "got -1 for outputs (3, 1)"),
    (small(), dict(method="lime"), "method 'lime' is not one of scorecam, gradcam"),
    (nn.Sequential(nn.Flatten(), nn.Linear(64*64, 1)), {}, "has no convolution before its outputs"),
    (nn.Conv2d(1, 1, 3), {}, "Conv2d has no convolution before its outputs"),
    (np.mean, {}, "needs a torch module"),
], ids=lambda value: value if isinstance(value, str) else type(value).__name__)
def test_what_cannot_be_explained_is_refused_in_one_line(model, options, message):
    with pytest.raises(ValueError) as e: explain(model, IMAGES, **options)
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("box", [(0, 0, 65, 3), (-1, 0, 3, 3), (3, 0, 1, 3), (0, 0, 3, np.inf)])
def test_boxes_outside_the_image(box):
    with pytest.raises(ValueError, match="box 0 must lie in an image of 64 × 64 pixels"): draw_boxes([box], (64, 64))


@pytest.mark.parametrize("method", ["scorecam", "gradcam"])
def test_networks_of_others_and_segmenters(method):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        resnet = torchvision.models.resnet18(num_classes=3)
    for p in resnet.parameters(): p.requires_grad_(False)                   # frozen networks have maps too
    maps = explain(resnet, IMAGES[:2], method, output=2, channels=3)
    assert maps.shape == (2, 64, 64) and 0 <= maps.min() and maps.max() <= 1 and resnet.training
    unet = build_model("unet", "resnet18", weights="none", outputs=2)
    maps = explain(unet, IMAGES[:1], method, output=1, layer="net.encoder.layer2")
    assert maps.shape == (1, 64, 64) and np.isfinite(maps).all()
    assert not [hook for part in unet.modules() for hook in part._forward_hooks]


def test_a_metric_of_maps_from_outside_is_recorded():
    METRICS.register(Metric("mass_ratio", "ratio of masses", "map", lambda maps, clean: maps.sum((1, 2))/clean.sum((1, 2))))
    try: records = explain_under_noise(small(), own_data(IMAGES, [0, 1, 0]), range(3), "0,0 0,10", replicates=2)
    finally: del METRICS["mass_ratio"]
    clean = records.condition == "0,0"
    assert len(records) == 3*3 and (records.mass_ratio[clean] == 1).all() and (records.mass_ratio[~clean] != 1).any()


def test_noise_is_the_same_in_any_batch():
    data = own_data(IMAGES, [0, 1, 0])
    whole, single = (explain_under_noise(small(), data, range(3), "0,0 4,2", batch_size=n) for n in (16, 1))
    numbers = whole.select_dtypes("number").columns
    np.testing.assert_allclose(whole[numbers], single[numbers], atol=1e-4)


def test_images_of_one_patient_have_no_interval_but_a_value():
    records = explain_under_noise(small(), own_data(IMAGES, [0, 1, 0], patient_ids=[1, 1, 1]), range(3), "0,0 0,10")
    summary, order = explanation_summary(records, 50), move_order(records, resamples=50)
    assert summary.value.notna().all() and summary.low.isna().all()
    assert order.share.between(0, 1).all() and order.low.isna().all()


@pytest.mark.skipif("CXR_REAL_DATA" not in os.environ, reason="needs CXR_REAL_DATA")
def test_annotated_boxes_of_chestxray14():
    folder = Path(os.environ["CXR_REAL_DATA"])/"nih"
    boxes = nih_boxes(folder/"BBox_List_2017.csv.gz", 256)
    assert len(boxes) == 984 and boxes.image_id.nunique() == 880            # as published (Wang et al. 2017)
    for finding, rows in boxes.groupby("finding"):                          # all lie in their images
        regions = annotated_regions(boxes, rows.image_id.unique(), finding, (256, 256))
        areas = (rows.x1 - rows.x0)*(rows.y1 - rows.y0)
        assert regions.any((1, 2)).all() and regions.sum() <= 1.05*areas.sum()
    assert pd.unique(boxes.finding).size == 8
