"Test a network of torchxrayvision under noise (random weights and labels: name weights and give your own data)."
import torchxrayvision as xrv

from cxr_noise_study.evaluation import evaluate_robustness
from cxr_noise_study.phantom import phantom
from cxr_noise_study.statistics import summarise

images, labels, findings = phantom(8, size=64).images, [[0, 1], [1, 0]]*4, ["Edema", "Effusion"]
network = xrv.models.DenseNet(weights=None, apply_sigmoid=True).eval()      # e.g. weights="densenet121-res224-all"
columns = [network.targets.index(finding) for finding in findings]
def model(x): return network(2048*x - 1024)[:, columns]                     # the library's grey levels: -1024 to 1024
records = evaluate_robustness(model, images, labels, "0,0 4,2", output="probabilities", structures=findings, channels=1)
print(summarise(records).query("metric == 'auroc'")[["output", "condition", "value"]].to_string(index=False))
