"The explorer in the browser: the same bits as `corrupt`, files read as the package reads them, no request to anywhere."
import base64, io, itertools, json, os, re, shutil, subprocess, sys, zlib
from hashlib import blake2b
from pathlib import Path
from urllib.parse import unquote

import nbformat, onnx, onnxruntime, pydicom, pytest
import numpy as np
import pandas as pd
from PIL import Image

from cxr_noise_study.channel import NoiseChannel, _cumulated, corrupt
from cxr_noise_study.images import content, read_grey, square, to_grey8
from cxr_noise_study.noise import LADDER, Severity
from cxr_noise_study.page import evaluate_folder
from cxr_noise_study.phantom import phantom
from tests.chromium import CHROMIUM, chromium
from tests.conftest import ROOT

sys.path.append(str(ROOT/"site"))
import explorer

NAMES = ["a", "", "5", 5, -7, 2**40, "ü", "胸部 \"x\"\\\n\x7f", "🫁", "n"*300]
MIXED = [Severity(4, 2), Severity(.3, .1), Severity(speckle=3), Severity(quantum=4, salt_pepper=5)]

needs_node = pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")


def ask(*questions):
    "Let node answer, in one process."
    done = subprocess.run(["node", str(ROOT/"tests"/"site.mjs")], input=json.dumps(questions), text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def greys(*shape, seed=0): return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
def packed(array): return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
def strengths(severity): return dict(severity.strengths)


@needs_node
def test_19_2_the_browser_draws_the_bits_of_python():
    shapes, cases = [(37, 53), (1, 1), (5, 7), (64, 3)], []
    for i, severity in enumerate([*LADDER[1:], *MIXED]):
        for j, name in enumerate(NAMES if i % 5 == 0 else NAMES[i % 5::4]):
            clean, seed, replicate = greys(*shapes[(i + j) % 4], seed=i), [0, 1, -3, 2**40][j % 4], j % 3
            cases.append((clean, severity, name, seed, replicate))
    found = ask(*(dict(ask="noisy", clean=packed(clean), severity=strengths(s), name=name, seed=seed, replicate=r)
                  for clean, s, name, seed, r in cases))
    wrong = [case[1:] for case, noisy in zip(cases, found) if noisy != packed(corrupt(*case))]
    assert len(cases) > 60 and not wrong


@needs_node
def test_19_2_listed_conditions_have_the_tables_that_the_page_was_made_with():
    presets = explorer.presets()
    assert [p["name"] for p in presets[:14]] == [str(s) for s in LADDER]
    found = ask(*(dict(ask="table", severity=p["severity"]) for p in presets))
    assert found == [p["crc"] for p in presets]


@needs_node
def test_19_2_any_other_condition_is_within_one_unit_of_the_last_place():
    rng = np.random.default_rng(5)
    drawn = [Severity(*rng.uniform(.05, 10, 2).round(2)) for _ in range(6)]
    drawn += [Severity(quantum=4, speckle=3, electronic=1, salt_pepper=10), Severity(.07), Severity(0, .01)]
    for severity, units in zip(drawn, ask(*(dict(ask="units", severity=strengths(s)) for s in drawn))):
        gap = abs(np.array(units) - _cumulated(NoiseChannel(severity).pmf).ravel().astype(float))
        assert gap.max() <= 1 and (gap > 0).sum() < 200, severity


@needs_node
def test_19_2_snr_and_bits_are_those_of_the_channel():
    histogram = np.bincount(phantom(1, size=64).images.ravel(), minlength=256)
    for severity in [Severity(4), Severity(1, 1), Severity(0, 10)]:
        snr, bits = ask(dict(ask="snr", severity=strengths(severity)),
                        dict(ask="information", severity=strengths(severity), histogram=histogram.tolist()))
        channel = NoiseChannel(severity)
        np.testing.assert_allclose([np.inf if s == "∞" else s for s in snr], channel.snr, rtol=1e-9)
        assert bits == pytest.approx(channel.information(histogram), abs=1e-9)


@needs_node
def test_19_2_hash_words_and_numbers_match_their_standards():
    texts = [b"x"*n for n in (0, 1, 127, 128, 129, 256, 300)]
    hashed = [np.frombuffer(blake2b(t, digest_size=16, person=b"8-bit").digest(), "<u4").tolist() for t in texts]
    assert ask(*(dict(ask="blake2b", text=base64.b64encode(t).decode()) for t in texts)) == hashed
    counter, key = [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]
    words = [[0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]]                       # Random123, kat_vectors
    assert ask(dict(ask="philox", counter=counter, key=key)) == words
    numbers = [.1, 4., 0., 1e-4, 9.9e-5, 1e-7, 1e15, 1e16, 1.5e22, 1/3, 123456.789]
    assert ask(*(dict(ask="float", x=x) for x in numbers)) == [repr(x) for x in numbers]
    assert ask(dict(ask="name", severity=dict(speckle=3, quantum=4, electronic=0), name="ü")) == [
        r'[0, "\u00fc", {"quantum": 4.0, "speckle": 3.0}, 0]']


def dicom(path, values, **tags):
    "Write a DICOM file: 16 bits unless its values have 8."
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = tags.pop("syntax", pydicom.uid.ExplicitVRLittleEndian)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = pydicom.uid.generate_uid()
    ds.Rows, ds.Columns = values.shape
    ds.BitsAllocated = ds.BitsStored = 8*values.itemsize
    ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel = ds.BitsStored - 1, int(values.dtype.kind == "i"), 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    inner = pydicom.Dataset()
    inner.CodeValue, inner.PixelData = "1", b"\0\0"
    inner["PixelData"].VR = "OW"
    ds.ViewCodeSequence = [inner]
    ds["ViewCodeSequence"].is_undefined_length = True
    ds["ViewCodeSequence"].value[0].is_undefined_length_sequence_item = True
    ds.PixelData = values.tobytes()
    ds["PixelData"].VR = "OW" if values.itemsize > 1 else "OB"
    for name, value in tags.items(): setattr(ds, name, value)
    ds.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    "Files that both sides can read."
    folder, rng = tmp_path_factory.mktemp("films"), np.random.default_rng(2)
    deep = rng.integers(100, 60000, (31, 44), dtype=np.uint16)
    made = [dicom(folder/"plain.dcm", deep),
            dicom(folder/"implicit.dcm", deep, syntax=pydicom.uid.ImplicitVRLittleEndian),
            dicom(folder/"white.dcm", deep, PhotometricInterpretation="MONOCHROME1"),
            dicom(folder/"slope.dcm", deep, RescaleSlope=-2, RescaleIntercept=7),
            dicom(folder/"signed.dcm", rng.integers(-3000, 3000, (9, 8), dtype=np.int16)),
            dicom(folder/"bytes.dcm", rng.integers(5, 99, (6, 8), dtype=np.uint8)),
            dicom(folder/"padded.dcm", np.where(deep < 9000, 0, deep).astype(np.uint16), PixelPaddingValue=0)]
    Image.fromarray(deep).save(folder/"deep.png")
    return [*made, folder/"deep.png"]


@needs_node
def test_19_2_dicom_and_png_are_read_as_the_package_reads_them(films, tmp_path):
    for path, found in zip(films, ask(*(dict(ask="read", path=str(path)) for path in films))):
        expected = to_grey8(read_grey(path))
        assert found == dict(width=expected.shape[1], height=expected.shape[0], grey=packed(expected)), path.name
    Image.fromarray(greys(37, 41)).save(tmp_path/"8.png")
    assert ask(dict(ask="read", path=str(tmp_path/"8.png")))[0]["grey"] == packed(greys(37, 41))


@needs_node
def test_19_2_what_cannot_be_read_says_why(films, tmp_path):
    values, whole = np.arange(64, dtype=np.uint16).reshape(8, 8), films[0].read_bytes()
    bad = {"photometric interpretation RGB": dicom(tmp_path/"rgb.dcm", values, PhotometricInterpretation="RGB"),
           "one grey value": dicom(tmp_path/"flat.dcm", values*0),
           "holds 3 frames": dicom(tmp_path/"frames.dcm", values, NumberOfFrames=3),
           "holds 128 bytes of pixels, its header states 176": dicom(tmp_path/"short.dcm", values, Rows=11)}
    compressed = whole.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0")
    for name, data in {"transfer syntax 1.2.840.10008.1.2.5": compressed, "is cut off": whole[:len(whole) - 5]}.items():
        bad[name] = tmp_path/f"{len(bad)}.dcm"
        bad[name].write_bytes(data)
    for (why, path), found in zip(bad.items(), ask(*(dict(ask="read", path=str(path)) for path in bad.values()))):
        assert why in found.get("error", ""), path
    cuts = []
    for n in range(132, len(whole) - 2, 137):
        cuts.append(tmp_path/f"cut{n}.dcm")
        cuts[-1].write_bytes(whole[:n])
    assert all("error" in found for found in ask(*(dict(ask="read", path=str(path)) for path in cuts)))


def prepared(grey, size):
    "A radiograph as a data set holds it at the size of a network."
    return to_grey8(square(grey, size), within=content(grey.shape, size))


@needs_node
def test_19_3_a_network_gets_the_radiograph_that_a_data_set_holds():
    shapes = [((37, 53), 32), ((300, 211), 128), ((96, 96), 96), ((50, 51), 64), ((512, 512), 128)]
    images = [greys(*shape, seed=i) for i, (shape, _) in enumerate(shapes)]
    asked = [dict(height=len(x), width=x.shape[1], size=size) for x, (_, size) in zip(images, shapes)]
    found = ask(*(dict(ask="resized", grey=packed(x), **words) for x, words in zip(images, asked)))
    assert found == [packed(prepared(x, size)) for x, (_, size) in zip(images, shapes)]
    masks = ask(*(dict(ask="mask", mask=packed(x//128), **words) for x, words in zip(images, asked)))
    assert masks == [packed((square(x//128, size) >= .5).astype(np.uint8)) for x, (_, size) in zip(images, shapes)]


@needs_node
def test_19_3_dice_and_contours_by_hand():
    one, other = np.eye(4, dtype=np.uint8), np.eye(4, k=1, dtype=np.uint8)
    one[0, 1] = 1
    pairs, masks = [(one, other), (one*0, one*0)], [np.ones((3, 3), np.uint8), one]
    asked = [dict(ask="dice", one=packed(a), other=packed(b)) for a, b in pairs]
    asked += [dict(ask="edges", mask=packed(mask), size=len(mask)) for mask in masks]
    assert ask(*asked) == [2*1/(5 + 3), 1, 12, 4*5 - 2*2]                     # the corner pixels touch twice


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The page, with smaller radiographs."
    path = tmp_path_factory.mktemp("built")/"explorer.html"
    path.write_text(explorer.page(size=96), encoding="utf-8")
    return path


def test_19_2_the_page_is_one_small_file_that_points_nowhere(built):
    html = built.read_text()
    assert len(html) < 2**21
    assert re.findall(r"(?:src|href)=[\"']?(\w+:?)", html) == ["data:"]
    asks = re.findall(r"\b(?:fetch|XMLHttpRequest|WebSocket|sendBeacon|import)\b *[(\"{]\S*", html)
    assert [asked.partition("(")[2] for asked in asks] == ["URL.createObjectURL(new"]    # the runtime, from the page
    assert not re.search(r"/\* (data|script|page.css) \*/|<!-- licences", html) and "Moshier" in html


@needs_chromium
def test_19_2_chromium_draws_the_bits_without_a_network(built, films, tmp_path):
    picture, clean = tmp_path/"rückseite.png", greys(33, 47)
    Image.fromarray(clean).save(picture)
    (tmp_path/"broken.png").write_bytes(picture.read_bytes()[:60])
    (tmp_path/"words.dcm").write_bytes(b"no radiograph")
    patient = phantom(1, size=96, findings=[""]).images[0]
    def drawn(): return int(tab.evaluate("document.getElementById('crc').textContent"), 16)
    def choose(path):
        tab.choose_file("#file", path)
        tab.wait(f"document.getElementById('name').value == {path.name!r}")
    with chromium(tmp_path) as tab:
        asked = "quantum=4&electronic=2&seed=3&replicate=1&name=%F0%9F%AB%81"
        tab.open(f"{built.as_uri()}#{asked}", "document.body.dataset.ready")
        assert drawn() == zlib.crc32(corrupt(patient, Severity(4, 2), "🫁", 3, 1).tobytes())
        for preset in explorer.presets():
            tab.evaluate(f"p = document.getElementById('preset'); p.value = {preset['name']!r}; p.onchange()")
            noisy = corrupt(patient, Severity(**preset["severity"]), "🫁", 3, 1)
            assert drawn() == zlib.crc32(noisy.tobytes()), preset
            assert "Bit for bit" in tab.evaluate("document.getElementById('exact').textContent")
        severity = Severity(quantum=4, salt_pepper=5)                                # the last preset
        for path, grey in ((picture, clean), (films[0], to_grey8(read_grey(films[0])))):
            choose(path)
            assert drawn() == zlib.crc32(corrupt(grey, severity, path.name, 3, 1).tobytes())
        for name, why in {"broken.png": "cut off", "words.dcm": "is not a PNG, JPEG or DICOM file"}.items():
            tab.choose_file("#file", tmp_path/name)
            tab.wait(f"document.getElementById('status').textContent.includes({why!r})")
        tab.evaluate("q = document.getElementById('quantum'); q.value = 11; q.oninput()")
        assert "must lie between 0 and 10, got 11" in tab.evaluate("document.getElementById('status').textContent")
        assert built.as_uri() in {url.partition("#")[0] for url in tab.requests} and not tab.complaints
        assert not [url for url in tab.requests if not url.startswith(("about:", "data:", built.as_uri()))]


@pytest.fixture(scope="module")
def with_networks(built):
    "The same page with its networks beside it."
    if not explorer.RUNTIME.is_dir(): pytest.skip("onnxruntime-web is not installed: make docs does it where npm is")
    explorer.ship_networks(built.parent/"networks")
    return built


def python_masks(file, grey, threshold=0):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    [[values]] = session.run(None, {session.get_inputs()[0].name: grey[None, None]/np.float32(255)})
    return (values > threshold).astype(np.uint8)


SEEN = """document.getElementById('seen').masks.map(found =>
  found.map(mask => String.fromCharCode(...mask.map(bit => 48 + bit))))"""


@needs_chromium
def test_19_3_networks_find_in_chromium_what_they_find_in_python(with_networks, tmp_path):
    patient, severity = phantom(1, size=96, findings=[""]), Severity(4, 1)
    noisy = corrupt(prepared(patient.images[0], 128), severity, "a", 3)
    truth = square(patient.lungs[0], 128) >= .5
    files = [explorer.HERE.parent/"networks"/f"{key}.onnx" for key in explorer.NETWORKS]
    with chromium(tmp_path) as tab:
        asked = "quantum=4&electronic=1&seed=3&name=a&networks=yes"
        tab.open(f"{with_networks.as_uri()}#{asked}", "document.body.dataset.ready")
        tab.wait("document.getElementById('networks-status').textContent.includes('ooked')", seconds=60)
        shown = int(tab.evaluate("document.getElementById('crc').textContent"), 16)
        assert shown == zlib.crc32(noisy.tobytes())
        rows = "[...document.querySelectorAll('#dice tbody tr')]"
        table = tab.evaluate(f"{rows}.map(row => [...row.cells].map(cell => cell.textContent))")
        for file, found, (_, name, dice, *_) in zip(files, tab.evaluate(SEEN), table[::2]):
            expected = python_masks(file, noisy)
            masks = np.array([np.array([*mask], int).reshape(128, 128) for mask in found])
            assert (masks != expected).mean() < .005 and expected.any()
            known = 2*(expected[0] & truth).sum()/(expected[0].sum() + truth.sum())
            assert name == "lungs" and float(dice) == pytest.approx(known, abs=.005)
        assert float(table[0][2]) < .9 < float(table[2][2])                          # the finding
        assert not tab.complaints and not [u for u in tab.requests if not u.startswith(("file:", "blob:", "data:"))]


def small_network(path, channels=3, size="s", outputs=1, **model):
    "An ONNX file: dark pixels are lung."
    helper = onnx.helper
    shapes = [helper.make_tensor_value_info("x", 1, ["n", channels, size, size]),
              helper.make_tensor_value_info("y", 1, ["n", outputs, size, size])]
    nodes = [helper.make_node("ReduceMean", ["x"], ["grey"], axes=[1], keepdims=1),
             helper.make_node("Sub", ["level", "grey"], ["y"])]
    level = onnx.numpy_helper.from_array(np.full((outputs, 1, 1), .45, np.float32), "level")
    graph = helper.make_graph(nodes, "dark", shapes[:1], shapes[1:], [level])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


@needs_chromium
def test_19_3_a_network_of_ones_own_is_dropped_in_and_a_bad_one_says_why(with_networks, tmp_path):
    good, grey = small_network(tmp_path/"dark.onnx"), prepared(phantom(1, size=96, findings=[""]).images[0], 128)
    bad = {"is not a network that ONNX Runtime can open": tmp_path/"bytes.onnx",
           "takes 2 channels, allowed are 1 and 3": small_network(tmp_path/"two.onnx", channels=2),
           "returns 3 structures, named are lungs": small_network(tmp_path/"three.onnx", outputs=3)}
    (tmp_path/"bytes.onnx").write_bytes(good.read_bytes()[:40])
    with chromium(tmp_path) as tab:
        tab.open(f"{with_networks.as_uri()}#quantum=4&name=a", "document.body.dataset.ready")
        tab.evaluate("document.getElementById('structures').value = 'lungs'")
        tab.choose_file("#onnx", good)
        tab.wait("document.getElementById('networks-status').textContent.includes('Looked')", seconds=60)
        [[found]] = tab.evaluate(SEEN)
        expected = corrupt(grey, Severity(4), "a")/np.float32(255) < np.float32(.45)
        assert (np.array([*found], int).reshape(128, 128) != expected).mean() < .005
        for why, path in bad.items():
            tab.choose_file("#onnx", path)
            tab.wait(f"document.getElementById('networks-status').textContent.includes({why!r})", seconds=60)
            assert path.name in tab.evaluate("document.getElementById('networks-status').textContent")
        assert not tab.complaints


def test_19_1_a_notebook_becomes_a_page(tmp_path):
    docs = pytest.importorskip("docs", reason="mkdocs is not installed: make docs installs it",
                               exc_type=ImportError)
    code, prose = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    table = "<style>x</style><table><tr><td>7</td></tr></table>"
    shown = nbformat.v4.new_output("execute_result", {"text/html": table})
    picture = nbformat.v4.new_output("display_data", {"image/png": packed(np.arange(9, dtype=np.uint8))})
    cells = [prose("# Tables\n`Table` costs `$5`, $s_q$ does not. [next](00a_noise.ipynb#x), [run](../examples/a.py)"),
             code("#| default_exp tables"), code("#| hide\nsecret = 1"), code("#| export\nclass Table: pass"),
             code("7", outputs=[shown, picture]), code("#| echo: false\nunseen = 2", outputs=[shown])]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/"00_tables.ipynb")
    (tmp_path/"pictures").mkdir()
    book = docs.Notebook(tmp_path/"00_tables.ipynb")
    writer = docs.Writer(tmp_path, [book])
    writer.notebook(book)
    page = (tmp_path/"00_tables.md").read_text()
    assert "`$5`, ⟦0⟧ does not. [next](00a_noise.md#x), [run](examples.md#a)" in page
    assert writer.formulas == [("s_q", "inline")]
    assert 'id="Table"' in page and "class Table: pass" in page and page.count("<td>7</td>") == 2
    assert not re.search("secret|unseen|<style>|default_exp", page)
    assert (tmp_path/"pictures"/"00_tables-0.png").read_bytes() == bytes(range(9))


@pytest.fixture(scope="module")
def site():
    "The folder that `make docs` wrote."
    where = os.environ.get("CXR_DOCS")
    if not where: pytest.skip("CXR_DOCS names no built site: make docs-test does")
    return Path(where)


PAGE = """({links: [...document.querySelectorAll('a[href]')].map(a => a.href),
  bad: [...document.images].filter(i => !i.alt || i.complete && !i.naturalWidth).map(i => i.src),
  ids: [...document.querySelectorAll('[id]')].map(e => e.id), token: document.body.textContent.includes('⟦')})"""


@needs_chromium
def test_19_1_every_page_loads_without_a_network(site, tmp_path):
    pages, wrong = {}, []
    with chromium(tmp_path) as tab:
        tab.resize(390, 844, mobile=True)
        for path in sorted(site.rglob("*.html")):
            tab.open(path.as_uri())
            tab.wait("document.documentElement.scrollWidth <= 390")                  # it fits a phone
            pages[path.as_uri()] = found = tab.evaluate(PAGE)
            left = [url for url in tab.requests if not url.startswith((site.as_uri(), "about:", "data:"))]
            if left or tab.complaints or found["bad"] or found["token"]:
                wrong.append((path.name, left, tab.complaints, found["bad"], found["token"]))
    assert len(pages) > 35 and not wrong
    for page, found in pages.items():
        for link in [link for link in found["links"] if link.startswith("file:")]:
            url, _, anchor = link.partition("#")
            assert url.startswith(site.as_uri()) and Path(unquote(url[7:])).is_file(), (page, link)
            assert not anchor or anchor.startswith("__") or unquote(anchor) in pages[url]["ids"], (page, link)


@needs_chromium
def test_19_1_search_finds_and_code_unfolds(site, tmp_path):
    with chromium(tmp_path) as tab:
        tab.resize(1440, 900)
        tab.open((site/"00b_channel.html").as_uri(), "document.querySelector('.unfold')")
        tab.evaluate("document.querySelector('.unfold').click()")
        assert tab.evaluate("[...document.querySelectorAll('details.code')].every(d => d.open)")
        assert "threads" in tab.evaluate("document.querySelector('#corrupt table').textContent")
        tab.evaluate("document.querySelector('.md-search__input').focus()")
        tab.send("Input.insertText", text="Walker")                                 # of the alias method
        tab.wait("document.querySelector('.md-search-result__link')?.href.includes('00b_channel.html')", seconds=60)
        assert not tab.complaints


AXE = ROOT/"site"/"node_modules"/"axe-core"/"axe.min.js"
SERIOUS = """axe.run(document, {resultTypes: ["violations"], preload: false}).then(({violations}) => violations
  .filter(({impact}) => impact === "serious" || impact === "critical").map(({id, nodes}) => [id, nodes[0].html]))"""
READY = "document.readyState == 'complete' && !document.querySelector('#crc:empty')"


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_19_6_axe_finds_nothing_serious(site, tmp_path, dark):
    if not AXE.is_file(): pytest.skip("axe-core is not installed: make docs does it where npm is")
    found, pages = {}, [path.as_uri() for path in sorted(site.rglob("*.html"))]
    if (site/"networks").is_dir(): pages.append(f"{(site/'explorer.html').as_uri()}#networks=yes")
    some = "/(index|00b_channel|examples|findings|leaderboard|explorer)[.]html"
    if dark: pages = [page for page in pages if re.search(some, page)]
    with chromium(tmp_path) as tab:
        tab.resize(1440, 900, dark=dark)
        for page in pages:
            tab.open(page, READY + " && !!document.querySelector('#dice table')"*page.endswith("networks=yes"))
            tab.evaluate(f"{AXE.read_text()};0")
            found[page] = tab.evaluate(SERIOUS)
    assert len(pages) > (4 if dark else 35) and not {page: wrong for page, wrong in found.items() if wrong}


@pytest.fixture
def made_records(tmp_path, monkeypatch):
    "Records of two models in a folder of findings, beside a table that no task is named in; returns them."
    curves = pytest.importorskip("curves")
    rng, rows = np.random.default_rng(0), []
    for regime, loss in (("clean", .1), ("ladder", .01)):
        for image, condition in itertools.product(range(12), ("0,0", "4,0", "10,0")):
            dice = .95 - loss*float(condition.split(",")[0])*rng.uniform(.8, 1)
            rows.append(dict(run=regime, dataset="mine", test_set="mine", task="lungs", arch="unet", train_noise=regime,
                             seed=0, checkpoint="best", structure="lungs", condition=condition, replicate=0, dice=dice,
                             s_q=float(condition[:-2]), s_e=0., image_id=str(image), patient_id=str(image)))
    (tmp_path/"findings").mkdir()
    pd.DataFrame(rows).to_parquet(tmp_path/"findings"/"mine.parquet")
    pd.DataFrame(dict(image_id=["a"], drift=[1.])).to_parquet(tmp_path/"findings"/"maps.parquet")
    monkeypatch.setattr(curves, "DATA", tmp_path)
    monkeypatch.setattr(curves, "FIGURES", tmp_path)
    return curves, pd.DataFrame(rows)


def test_19_4_curves_hold_the_means_of_the_records_with_their_patients(made_records):
    curves, records = made_records
    found, left_out = curves.findings()
    assert [*left_out] == ["maps.parquet"] and [c["train_noise"] for c in found] == ["clean", "ladder"]
    for curve, (_, rows) in zip(found, records.groupby("train_noise")):
        assert (curve["output"], curve["metric"], curve["images"], curve["patients"]) == ("lungs", "dice", 12, 12)
        for condition, mean in rows.groupby("condition").dice.mean().items():
            value, low, high, floor = curve["points"][condition]
            assert value == pytest.approx(mean, abs=1e-5) and low < value < high and floor is None
    shown = json.loads(curves.script(found, curves.FILTERS).removeprefix("var shown = "))
    assert [*shown["conditions"]] == ["0,0", "4,0", "10,0"]                   # in the order of severity
    assert {f["key"] for f in shown["filters"]} >= {"task", "arch", "train_noise", "test_set"}


def test_19_4_evaluate_writes_an_entry_that_the_leaderboard_reads(made_records, folder, tmp_path):
    curves, _ = made_records
    model = small_network(tmp_path/"dark.onnx", channels=1)
    evaluate_folder(model, folder, tmp_path/"report", ladder="0,0 10,0", size=64, progress=False)
    (tmp_path/"leaderboard").mkdir()
    entry = (tmp_path/"report"/"leaderboard.json").read_text()
    (tmp_path/"leaderboard"/"dark.json").write_text(entry)
    [(read, found)] = curves.leaderboard()
    records = pd.read_parquet(tmp_path/"report"/"records.parquet")
    dice = next(curve for curve in found if curve["metric"] == "dice")
    assert read["model"]["name"] == "dark" and read["data"]["patients"] == records.patient_id.nunique()
    for condition, mean in records.groupby("condition").dice.mean().items():
        assert dice["points"][condition][0] == pytest.approx(mean, abs=1e-4)
    (tmp_path/"leaderboard"/"bad.json").write_text(entry.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match=r"bad.json is not an entry of the leaderboard: format: 1 was expected"):
        [*curves.leaderboard()]


@needs_chromium
def test_19_4_a_reader_filters_curves_reads_points_and_takes_the_csv(site, tmp_path):
    numbers = pd.read_csv(ROOT/"figures"/"wingspan_lungs_protocol.csv").query("metric == 'dice' and condition == '0,0'")
    with chromium(tmp_path) as tab:
        tab.resize(1280, 900)
        tab.open((site/"findings.html").as_uri(), "document.querySelector('#curves svg path')")
        def choose(key, value):
            tab.evaluate(f"s = document.getElementById('curves-{key}'); s.value = {value!r}; s.onchange()")
        choose("file", "figure: wingspan lungs protocol")
        csv = pd.read_csv(io.StringIO(tab.evaluate("document.getElementById('curves').csv()")))
        taken = csv[(csv.metric == "dice") & (csv.condition == "0,0")].set_index("train_noise").value
        assert taken.to_dict() == pytest.approx(numbers.set_index("train_noise").value.to_dict(), abs=1e-4)
        assert set(csv.file) == {"figure: wingspan lungs protocol"} and csv.patients.nunique() == 1
        tab.evaluate("document.querySelector('#curves .curves-figure > svg').focus()")
        tab.send("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
        read = tab.evaluate("document.querySelector('.curves-readout').textContent")
        assert re.search(r"no noise: 0[.]\d{3} \[0[.]\d{3}, 0[.]\d{3}\], n = 32 images of 32 patients", read), read
        assert not tab.complaints
