"Build the noise explorer: one HTML file that holds its code, its conditions and its radiographs."
import argparse, base64, io, json, re, zlib
from pathlib import Path

from PIL import Image

from cxr_noise_study.channel import _alias_table, _entries
from cxr_noise_study.dose import CLINICAL
from cxr_noise_study.noise import LADDERS, SOURCES, Severity
from cxr_noise_study.phantom import phantom

HERE = Path(__file__).parent/"explorer"
MODULES = ("channel", "field", "read", "page")  # in the order of their imports
FINDINGS = ("", "Effusion", "Edema")            # one phantom each
SLIDERS = {"quantum": ("Quantum", 10), "electronic": ("Electronic", 10), "speckle": ("Speckle", 10),
           "salt_pepper": ("Salt and pepper", 100)}  # source → label and end
LICENCES = """<p>This page: Apache-2.0, the cxr_noise_study authors. The coefficients of the normal distribution are those
of the Cephes Math Library 2.9, copyright 1984–2000 Stephen L. Moshier, as SciPy distributes them (BSD-3-Clause).
Philox is after Salmon et al. 2011, BLAKE2b after RFC 7693. No other code ships. The radiographs are computed.</p>"""


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
    "Compute the radiographs that ship: name, label and PNG in base 64."
    made = phantom(len(FINDINGS), size=size, findings=list(FINDINGS))
    def png(image):
        Image.fromarray(image).save(file := io.BytesIO(), "PNG", optimize=True)
        return base64.b64encode(file.getvalue()).decode()
    return [dict(name=f"phantom {i}", label=f"patient {i}, {finding or 'healthy'}", png=png(image))
            for i, (finding, image) in enumerate(zip(FINDINGS, made.images))]


def script():
    "Join the modules into one, which a page needs that is opened as a file."
    code = "\n".join((HERE/f"{name}.mjs").read_text(encoding="utf-8") for name in MODULES)
    return re.sub(r"^export ", "", re.sub(r"^import .*\n", "", code, flags=re.M), flags=re.M)


def page(size=512, home=""):
    "Write the whole page as text, with a link to the page that is its home."
    sources = [dict(name=name, label=f"{label} severity", unit=SOURCES[name].unit, most=most)
               for name, (label, most) in SLIDERS.items()]
    data = json.dumps(dict(presets=presets(), pictures=pictures(size), sources=sources)).replace("</", "<\\/")
    back = f'<a href="{home}">cxr_noise_study</a> · ' if home else ""
    parts = {"<!-- home -->": back, "/* page.css */": (HERE/"page.css").read_text(encoding="utf-8"), "<!-- licences -->": LICENCES,
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
    print(f"{output}: {output.stat().st_size/2**20:.2f} MB")
