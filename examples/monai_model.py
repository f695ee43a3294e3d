"Test a network of MONAI under noise (random weights and computed radiographs: put your own in their place)."
from monai.networks.nets import UNet

from cxr_noise_study.evaluation import evaluate_robustness
from cxr_noise_study.phantom import phantom
from cxr_noise_study.statistics import summarise

made = phantom(8, size=64)          # images (n, h, w) uint8; class of each pixel (n, h, w): 0 background, 1 lungs
network = UNet(spatial_dims=2, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2))
records = evaluate_robustness(network, made.images, made.lungs, "0,0 4,2", output="classes", structures=["lungs"],
                              channels=1, patient_ids=made.patients.patient_id, progress=False)
print(summarise(records).query("metric == 'dice'")[["condition", "value", "low", "high"]].to_string(index=False))
