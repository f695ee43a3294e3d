"""Write the table of photons per air kerma, cxr_noise_study/dose.csv, with a model of X-ray spectra.

    python -m venv /tmp/spectra && /tmp/spectra/bin/pip install spekpy==2.5.4
    /tmp/spectra/bin/python data/beams.py

spekpy (MIT; Poludniowski et al. 2021, Med Phys 48:3630) is needed here only. Tungsten anode of 12 degrees, 2.5 mm of
aluminium in the tube, and the added aluminium of each column; photons per mm² and µGy of air kerma, without scatter.
The last lines compare the standard beams with IEC 62220-1:2003 and IEC 62220-1-1:2015.
"""
from pathlib import Path

from spekpy import Spek

ALUMINIUM, VOLTAGES = (0, 5, 10, 15, 20, 25, 30, 40, 50), range(40, 151, 5)
STANDARD = {"RQA3": (50, 10, 21759, 20673), "RQA5": (70, 21, 30174, 29653), "RQA7": (90, 30, 32362, 32490),
            "RQA9": (120, 40, 31077, 31007)}


def photons(kvp, aluminium):
    "Photons per mm² and µGy: spekpy gives both per mAs, the fluence per cm²."
    beam = Spek(kvp=kvp, th=12).filter("Al", 2.5 + aluminium)
    return beam.get_flu()/100/beam.get_kerma()


rows = [[f"{kvp}", *(f"{photons(kvp, aluminium):.0f}" for aluminium in ALUMINIUM)] for kvp in VOLTAGES]
table = [["kvp", *map(str, ALUMINIUM)], *rows]
path = Path(__file__).parents[1]/"cxr_noise_study"/"dose.csv"
path.write_text("\n".join(map(",".join, table)) + "\n")
for name, (kvp, aluminium, first, second) in STANDARD.items():
    here = photons(kvp, aluminium)
    editions = ((2003, first), (2015, second))
    print(f"{name}: {here:.0f} here;", *(f"{value} in {year} ({here/value - 1:+.1%})" for year, value in editions))
