"Build the noise explorer: one HTML file that holds its code, its conditions and its radiographs."
import argparse, base64, gzip, io, json, re, zlib
from pathlib import Path

import numpy as np
import onnx
from PIL import Image

from cxr_noise_study.channel import _alias_table, _entries
from cxr_noise_study.dose import CLINICAL, FIELD_MM, RQA5, TARGET
from cxr_noise_study.noise import LADDERS, SOURCES, Severity
from cxr_noise_study.phantom import phantom

HERE = Path(__file__).parent/"explorer"
MODULES = ("channel", "field", "model", "networks", "read", "page")  # in the order of their imports
STRUCTURES = ("lungs", "heart")                 # bits of a phantom's mask
NETWORKS = {"wingspan_clean": "trained on clean radiographs", "wingspan_ladder": "trained on noise, the paper's ladder"}
RUNTIME = Path(__file__).parent/"node_modules"/"onnxruntime-web"/"dist"
FINDINGS = ("", "Effusion", "Edema")            # one phantom each
SLIDERS = {"quantum": ("Quantum", 10), "electronic": ("Electronic", 10), "speckle": ("Speckle", 10),
           "salt_pepper": ("Salt and pepper", 100)}  # source → label and end
LICENCES = """<p>This page: Apache-2.0, the cxr_noise_study authors. The coefficients of the normal distribution are those
of the Cephes Math Library 2.9, copyright 1984–2000 Stephen L. Moshier, as SciPy distributes them (BSD-3-Clause).
Philox is after Salmon et al. 2011, BLAKE2b after RFC 7693. The networks run in ONNX Runtime Web, copyright Microsoft
Corporation (MIT), loaded when they are asked for. They were trained on the Wingspan radiographs (Dong et al. 2018 and
2019, MIT); their files hold numbers only. No other code ships. The radiographs are computed.</p>"""


def presets():
    "List the conditions whose tables are compared: name, label, group, severities and the checksum of the alias table."
    clinical = [(f"deviation index {d} dB", s) for d, s in zip(CLINICAL, LADDERS["clinical"])]
    others = [Severity(speckle=3), Severity(salt_pepper=10), Severity(quantum=4, salt_pepper=5)]
    groups = {"The paper's 14 conditions": [(s.label, s) for s in LADDERS["paper"]],
              "Clinical: dose below target": clinical, "Other sources": [(str(s), s) for s in others]}
    plain = str.maketrans("", "", "${}\\")
    return [dict(name=str(s), label=label.translate(plain), group=group, severity=dict(s.strengths),
                 crc=zlib.crc32(_alias_table(s, _entries(s)).tobytes()))
            for group, conditions in groups.items() for label, s in conditions]


def pictures(size=512):
    "Compute the radiographs that ship: name, label, PNGs in base 64 of image and masks, a bit for each, times 85."
    made = phantom(len(FINDINGS), size=size, findings=list(FINDINGS))
    def png(image):
        Image.fromarray(image).save(file := io.BytesIO(), "PNG", optimize=True)
        return base64.b64encode(file.getvalue()).decode()
    bits = sum(getattr(made, name).astype(np.uint8) << i for i, name in enumerate(STRUCTURES))*85
    return [dict(name=f"phantom {i}", label=f"patient {i}, {finding or 'healthy'}", png=png(image), masks=png(masks))
            for i, (finding, image, masks) in enumerate(zip(FINDINGS, made.images, bits))]


def networks():
    "List the networks that ship: key, label, structures and size, from their files; none without their runtime."
    if not RUNTIME.is_dir(): return []
    def words(key): return {p.key: p.value for p in onnx.load(HERE.parent/"networks"/f"{key}.onnx").metadata_props}
    return [dict(key=key, label=label, names=words(key)["task"].split("_"), size=int(words(key)["size"]))
            for key, label in NETWORKS.items()]


def ship_networks(folder):
    "Write runtime and networks as scripts that a page loads on demand, also where it is opened as a file."
    folder.mkdir()
    files = {"runtime": RUNTIME/"ort.wasm.bundle.min.mjs", "wasm": RUNTIME/"ort-wasm-simd-threaded.wasm"}
    files |= {key: HERE.parent/"networks"/f"{key}.onnx" for key in NETWORKS}
    for name, file in files.items():
        text = base64.b64encode(gzip.compress(file.read_bytes(), mtime=0)).decode()
        (folder/f"{name}.js").write_text(f'shipped["{name}"] = "{text}"', encoding="utf-8")


def script():
    "Join the modules into one, which a page needs that is opened as a file."
    code = "\n".join((HERE/f"{name}.mjs").read_text(encoding="utf-8") for name in MODULES)
    return re.sub(r"^export ", "", re.sub(r"^import .*\n", "", code, flags=re.M), flags=re.M)


def page(size=512, home=""):
    "Write the whole page as text, with a link to the page that is its home."
    sources = [dict(name=name, label=f"{label} severity", unit=SOURCES[name].unit, most=most)
               for name, (label, most) in SLIDERS.items()]
    dose = dict(photons=RQA5, target=TARGET, field=FIELD_MM, structures=STRUCTURES)
    worker = (HERE/"worker.mjs").read_text(encoding="utf-8")
    data = json.dumps(dict(presets=presets(), pictures=pictures(size), sources=sources, dose=dose, networks=networks(),
                           worker=worker)).replace("</", "<\\/")
    back = f'<a href="{home}">cxr_noise_study</a> · ' if home else ""
    style = (HERE/"page.css").read_text(encoding="utf-8")
    parts = {"<!-- home -->": back, "/* page.css */": style, "<!-- licences -->": LICENCES,
             "/* data */": data, "/* script */": script()}
    html = (HERE/"page.html").read_text(encoding="utf-8")
    for mark, text in parts.items(): html = html.replace(mark, text)
    return html


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="HTML file to write")
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(), encoding="utf-8")
    if networks(): ship_networks(output.parent/"networks")
    print(f"{output}: {output.stat().st_size/2**20:.2f} MB")
