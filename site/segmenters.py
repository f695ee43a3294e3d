"Make the explorer's segmenters: a finished run as an ONNX file with weights of 8 bits, as accurate as the run's."
import argparse, json
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from cxr_noise_study.evaluation import export_onnx
from cxr_noise_study.networks import load_checkpoint

LICENCE = "MIT (weights and training images); no image is in this file"
SOURCE = "Wingspan chest radiographs with masks of lungs and heart, Dong et al., MICCAI 2018 and 2019"


def in_bytes(weights):
    "Round weights (outputs, …) to integers in -127 … 127 and one scale for each output."
    scale = np.abs(weights).max(axis=tuple(range(1, weights.ndim)), keepdims=True)/127
    scale[scale == 0] = 1
    return np.rint(weights/scale).astype(np.int8), scale.astype(np.float32)


def compress(model, least=20000):
    "Store the weights of convolutions as bytes; two nodes turn them back when the model is opened."
    graph, nodes = model.graph, []
    kernels = {node.input[1] for node in graph.node if node.op_type == "Conv"}
    for tensor in [t for t in graph.initializer if t.name in kernels and np.prod(t.dims) >= least]:
        name, weights = tensor.name, numpy_helper.to_array(tensor)
        whole, scale = in_bytes(weights)
        graph.initializer.remove(tensor)
        graph.initializer.extend([numpy_helper.from_array(whole, f"{name}.bytes"),
                                  numpy_helper.from_array(scale, f"{name}.scale")])
        nodes += [helper.make_node("Cast", [f"{name}.bytes"], [f"{name}.float"], to=onnx.TensorProto.FLOAT),
                  helper.make_node("Mul", [f"{name}.float", f"{name}.scale"], [name])]
    for node in reversed(nodes): graph.node.insert(0, node)
    onnx.checker.check_model(model)
    return model


def described(model, folder):
    "Put what a reader should know into the file."
    card = json.loads((folder/"run.json").read_text(encoding="utf-8"))
    p = card["parameters"]
    words = dict(run=card["run"], task=p["task"], arch=p["arch"], encoder=p["encoder"], train_noise=p["train_noise"],
                 size=p["size"], seed=p["seed"], epochs=p["epochs"], images=card["images"], data=SOURCE,
                 licence=LICENCE)
    helper.set_model_props(model, {name: value if isinstance(value, str) else json.dumps(value)
                                   for name, value in words.items()})
    return model


def make(folder, output):
    "Export the network of a finished run."
    network, card = load_checkpoint(folder/"checkpoint.safetensors")
    file = export_onnx(network, output, (1, card["size"], card["size"]), traced=True)
    file.write_bytes(described(compress(onnx.load(file)), folder).SerializeToString())
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of a finished run that segments")
    parser.add_argument("output", type=Path, help="ONNX file to write")
    args = parser.parse_args()
    file = make(args.folder, args.output)
    print(f"{file}: {file.stat().st_size/2**20:.1f} MB")
