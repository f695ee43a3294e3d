"Build the site from the executed notebooks: _docs/index.html opens without a server, and asks for nothing elsewhere."
import argparse, ast, base64, importlib, inspect, json, logging, re, shutil, tempfile
from html import escape
from pathlib import Path

import nbformat
from fastcore.basics import AttrDict
from fastcore.docments import docments
from latex2mathml.converter import convert
from mkdocs.commands.build import build
from mkdocs.config import load_config

import curves, explorer

HERE, ROOT = Path(__file__).parent, Path(__file__).parent.parent
PAGES = {"CONTRIBUTING.md": "contributing.md", "data/README.md": "data.md", "figures/README.md": "figures.md"}
INVITATION = "[Put noise on a radiograph, or on your own: the explorer](explorer.html){ .md-button }"
PARTS = {"00": "Noise and radiographs", "01": "Data", "02": "Models", "03": "Evaluation", "04": "One run",
         "05": "Results"}                                                 # number of a notebook → part, else further


# A notebook's cells, taken apart.
def directives(source):
    "The words behind #| at the start of a cell."
    return set(re.findall(r"^#\|\s*(\w+)", source, flags=re.M))


def without_directives(source): return re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")


def definitions(source):
    "Public names that a cell defines, a patched method as Class.method."
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    for node in ast.parse(without_directives(source)).body:
        if not isinstance(node, kinds) or node.name.startswith("_"): continue
        patched = [d for d in getattr(node, "decorator_list", []) if "patch" in ast.unparse(d)]
        yield f"{ast.unparse(node.args.args[0].annotation)}.{node.name}" if patched else node.name


class Notebook:
    "One notebook: its cells, the module that it writes, and what that defines."
    def __init__(self, path):
        self.path, self.cells = path, nbformat.read(path, as_version=4).cells
        self.page = f"{path.stem}.md"
        code = [cell.source for cell in self.cells if cell.cell_type == "code"]
        found = re.search(r"^#\|\s*default_exp\s+(\w+)", "\n".join(code), flags=re.M)
        self.module = importlib.import_module(f"cxr_noise_study.{found[1]}") if found else None
        prose = "\n".join(cell.source for cell in self.cells if cell.cell_type == "markdown")
        self.title = re.search(r"^# (.+)", prose, flags=re.M)[1]
        exported = [source for source in code if "export" in directives(source)]
        self.names = [name for source in exported for name in definitions(source)]

    def find(self, name):
        "The object of a name, a property as its function."
        found = self.module
        for part in name.split("."): found = inspect.getattr_static(found, part)
        found = getattr(found, "__func__", found)
        return getattr(found, "fget", None) or found


# Cells as Markdown.
class Writer:
    "Write pages into a folder; formulas stand as tokens until the pages are HTML."
    def __init__(self, folder, notebooks):
        self.folder, self.formulas, self.notebooks = folder, [], notebooks
        places = [(name, f"{book.page}#{name}") for book in notebooks for name in book.names]
        self.places = {name: place for name, place in places if sum(n == name for n, _ in places) == 1}

    def token(self, tex, display):
        self.formulas.append((tex, display))
        return f"⟦{len(self.formulas) - 1}⟧"

    def prose(self, text, page=""):
        "Markdown with formulas as tokens, links to pages instead of files, and names that lead to their definitions."
        def block(match): return f"\n\n{self.token(match[1], 'block')}\n\n"
        def inline(match): return self.token(match[1], "inline")
        parts = re.split(r"(^```.*?^```|``.+?``|`[^`\n]+`)", text, flags=re.M | re.S)  # every second one is code
        for i in range(0, len(parts), 2):
            parts[i] = re.sub(r"\$\$(.+?)\$\$", block, parts[i], flags=re.S)
            parts[i] = re.sub(r"(?<![\\$\w])\$(?=\S)([^$]+?)(?<=\S)\$(?!\d)", inline, parts[i])
        for i in range(1, len(parts), 2):
            place = self.places.get(parts[i].strip("`"), "")
            line = parts[i - 1].rpartition("\n")[2]
            if place and not place.startswith(f"{page}#") and not line.endswith("[") and not line.startswith("#"):
                parts[i] = f"[{parts[i]}]({place})"
        return re.sub(r"\]\(([^)\s]+)\)", lambda m: f"]({self.target(m[1])})", "".join(parts))

    def target(self, link):
        "Where a link of a notebook leads on the site."
        path, mark, anchor = link.partition("#")
        name = re.sub(r"^(\.\./)+", "", path)
        if "://" in link or not path: return link
        if path.endswith(".ipynb"): return Path(path).with_suffix(".md").name + mark + anchor
        if name.startswith("examples/"): return f"examples.md#{Path(name).stem}"
        return PAGES.get(name, name) + mark + anchor

    def entry(self, book, name):
        "A definition: signature, summary, and its parameters as a table."
        found = book.find(name)
        signature = written_signature(found)
        summary = self.prose(inspect.getdoc(found) or "", book.page)
        if inspect.isclass(found) and summary.startswith(f"{name}("): summary = ""
        kind = "class" if inspect.isclass(found) else "function" if callable(found) else "value"
        parts = [f'<div class="definition" id="{name}" markdown="1">',
                 f'<p class="signature"><span>{kind}</span> <code><b>{name}</b>{escape(signature)}</code></p>',
                 summary, parameter_table(found), "</div>"]
        return "\n\n".join(parts)

    def image(self, data, book, heading):
        "Write a picture beside its page and return the Markdown that shows it."
        kind = next(kind for kind in ("image/png", "image/jpeg") if kind in data)
        number = len([*(self.folder/"pictures").glob(f"{book.path.stem}-*")])
        path = self.folder/"pictures"/f"{book.path.stem}-{number}.{kind[6:]}"
        path.write_bytes(base64.b64decode(data[kind]))
        return f"![Figure of the section {heading}](pictures/{path.name})"

    def output(self, out, book, heading):
        data = out.get("data", {})
        if out.output_type == "stream": return fenced(out.text, "text")
        if any(kind.startswith("image/") for kind in data): return self.image(data, book, heading)
        if "text/markdown" in data: return self.prose(data["text/markdown"], book.page)
        if "text/html" in data:
            table = re.sub(r"<style.*?</style>|\n\s*", "", data["text/html"], flags=re.S)
            return f'<div class="output" data-search-exclude>{table}</div>'
        return fenced(data.get("text/plain", ""), "text")

    def code(self, cell, book, heading):
        "Definitions as tables, the code folded, the outputs open."
        words = directives(cell.source)
        if words & {"hide", "default_exp"}: return ""
        source, parts = without_directives(cell.source), []
        if "export" in words: parts += [self.entry(book, name) for name in definitions(cell.source)]
        outputs = [self.output(out, book, heading) for out in cell.outputs]
        is_test = re.search(r"\btest_\w+\(|^\s*assert ", source, flags=re.M) and not outputs
        summary = "Source" if words & {"export", "exporti"} else "Tests" if is_test else "Code"
        if source and "echo" not in words and "remove-input" not in cell.metadata.get("tags", []):
            parts.append(f'<details class="code" data-search-exclude markdown="1"><summary>{summary}</summary>\n\n'
                         f"{fenced(source, 'python')}\n\n</details>")
        return "\n\n".join(parts + outputs)

    def notebook(self, book):
        parts, heading = [], book.title
        for cell in book.cells:
            headings = re.findall(r"^#+ (.+)", cell.source, flags=re.M) if cell.cell_type == "markdown" else []
            heading = re.sub(r"[\[\]$`]", "", headings[-1]) if headings else heading
            prose = cell.cell_type == "markdown"
            parts.append(self.prose(cell.source, book.page) if prose else self.code(cell, book, heading))
        if book.path.stem == "index": parts.insert(1, INVITATION)
        (self.folder/book.page).write_text("\n\n".join(parts), encoding="utf-8")

    def api(self):
        "All definitions, by module."
        lines = ["# API by module", "Each name leads to its definition, the reason for it and its tests."]
        for book in self.notebooks:
            if not book.names: continue
            summary = (book.module.__doc__ or "").strip()
            lines += [f"## {book.module.__name__.split('.')[-1]}", f"{summary} ([{book.title}]({book.page}))", ""]
            rows = [f"| [`{name}`]({book.page}#{name}) | {first_line(book.find(name))} |" for name in book.names]
            lines.append("\n".join(["| name | what it does |", "|---|---|", *rows]))
        (self.folder/"api.md").write_text("\n\n".join(lines), encoding="utf-8")

    def finish(self, site):
        "Put formulas where their tokens stand, in pages and in the index of the search; drop what needs a server."
        for name in ("404.html", "sitemap.xml", "sitemap.xml.gz"): (site/name).unlink()
        for path in site.rglob("*.map"): path.unlink()
        mathml = [formula(tex.strip(), display) for tex, display in self.formulas]
        for path in site.rglob("*.html"):
            html = path.read_text(encoding="utf-8")
            path.write_text(re.sub("⟦(\\d+)⟧", lambda m: mathml[int(m[1])], html), encoding="utf-8")
        index = site/"search"/"search_index.json"
        text = re.sub("⟦(\\d+)⟧", lambda m: json.dumps(self.formulas[int(m[1])][0])[1:-1], index.read_text("utf-8"))
        index.with_suffix(".js").write_text(f"var __index = {text}", encoding="utf-8") # where a file cannot be fetched
        index.write_text(text, encoding="utf-8")


def formula(tex, display):
    "MathML; a long formula in a line may scroll on a narrow screen."
    mathml = convert(tex, display=display).replace('xmlns="http://www.w3.org/1998/Math/MathML" ', "")
    return f'<span class="formula">{mathml}</span>' if display == "inline" and len(tex) > 40 else mathml


def fenced(text, language): return f"````{language}\n{text.rstrip()}\n````"


def written(value):
    "A default or an annotation as a reader would type it."
    if value is inspect.Parameter.empty or value is type(None): return ""  # of a default None nothing follows
    text = value if isinstance(value, str) else getattr(value, "__name__", None) or repr(value)
    return re.sub(r" at 0x[0-9a-f]+|typing\.|numpy\.", "", text)


def written_signature(found):
    "Names and defaults of the parameters, without types, which stand in the table."
    if not callable(found): return ""
    try: parameters = inspect.signature(found).parameters.values()
    except ValueError: return ""
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    def word(p): return marks.get(p.kind, "") + p.name + ("" if p.default is p.empty else f"={written(p.default)}")
    return f"({', '.join(word(p) for p in parameters if p.name != 'self')})"


def parameter_table(found):
    "Type, default and meaning of each parameter that the source comments, and what is returned."
    if not callable(found): return ""
    try: rows = docments(found, full=True, returns=True)
    except (TypeError, OSError, SyntaxError): return ""
    except ValueError:                                                    # fastcore compares a default, an array
        rows = {name: AttrDict(docment=text) for name, text in docments(found, returns=True).items()}
    def cell(text): return " ".join(str(text or "").split()).replace("|", "\\|").replace("<", "&lt;")
    def line(name, row): return f"| {name} | {cell(written(row.get('anno', '')))} | {cell(row.docment)} |"
    lines = [line("returns" if name == "return" else f"`{name}`", row) for name, row in rows.items() if row.docment]
    return "\n".join(["| parameter | type | meaning |", "|---|---|---|", *lines]) if lines else ""


def first_line(found):
    text = (inspect.getdoc(found) or "").partition("\n")[0]
    return "" if text.startswith(f"{getattr(found, '__name__', '')}(") else text.replace("|", "\\|")


# The site.
def examples(folder):
    parts = ["# Examples"]
    for path in sorted((ROOT/"examples").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        parts.append(f"## {path.stem.replace('_', ' ').capitalize()} {{#{path.stem}}}\n\n"
                     f"{ast.get_docstring(ast.parse(source)) or ''}\n\n{fenced(source, 'python')}")
    (folder/"examples.md").write_text("\n\n".join(parts), encoding="utf-8")


def drawn_page(name, title, text, data=""):
    "A page of curves whose data is the script of the same name; without data, its words."
    scripts = "".join(f'<script src="{file}.js"></script>\n' for file in (name, "curves"))
    drawing = f'<div id="curves" data-name="{name}"></div>\n{scripts}'
    return "\n\n".join([f"# {title}", text, drawing]) if data else f"# {title}\n\n{text}"


def findings_page(folder):
    "Curves and tables of all records."
    found, left_out = curves.findings()
    (folder/"findings.js").write_text(data := curves.script(found, curves.FILTERS), encoding="utf-8")
    others = "".join(f" `{name}` has none: {escape(why)}." for name, why in left_out.items())
    text = f"""Every model that was tested, from the records in `data/findings` and the numbers behind the figures:
{len(found)} curves, summarised by the package when this page was made, with intervals over patients
({curves.RESAMPLES} resamples). Point at a curve for value, interval and n.{others}"""
    (folder/"findings.md").write_text(drawn_page("findings", "Curves of the findings", text, data), encoding="utf-8")


def leaderboard_page(folder):
    "Curves and tables of the models that were entered, and how to enter one."
    entries = [*curves.leaderboard()]
    found = [curve for _, part in entries for curve in part]
    if found: (folder/"leaderboard.js").write_text(curves.script(found, curves.ENTRY), encoding="utf-8")
    def row(task, package, model, data, **_):
        cells = (model["name"], f"`{model['digest']}`, {model['size']} px", f"{data['name']}, `{data['digest']}`",
                 f"{data['images']}, {data['patients']}", task, package)
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    table = ["| model | digest, size | data set, digest | images, patients | task | package |", "|---"*6 + "|"]
    rows = [row(**entry) for entry, _ in entries]
    text = """Models under noise, condition by condition: no model stands here with one number, and models are compared
on the same images only (the same digest of the data). `cxr-noise evaluate MODEL.onnx DATA_DIR` writes
`report/leaderboard.json`; put into `data/leaderboard`, it appears here once `make docs` has checked it against its
schema, `cxr_noise_study/leaderboard.json`."""
    page = drawn_page("leaderboard", "Leaderboard", text, found)
    (folder/"leaderboard.md").write_text("\n\n".join([page, *["\n".join(table + rows)]*bool(rows)]), encoding="utf-8")


def navigation(notebooks):
    "Findings, explorer, the notebooks in reading order, and what else there is."
    reading = {}
    for book in notebooks:
        if book.path.stem == "index": continue
        part = PARTS.get(book.path.stem[:2], "Further")
        reading.setdefault(part, []).append({book.title: book.page})
    return [{"Findings": "index.md"}, {"Explorer": "explorer.html"},
            {"Curves": [{"Findings": "findings.md"}, {"Leaderboard": "leaderboard.md"}]},
            {"Read": [{part: pages} for part, pages in reading.items()]}, {"API": "api.md"},
            {"More": [{"Examples": "examples.md"}, {"Data sets": "data.md"}, {"Figures": "figures.md"},
                      {"Contributing": "contributing.md"}, {"Licences": "licences.md"}]}]


def write_pages(folder):
    "Write the sources of the site into a folder; return what wrote them."
    (folder/"pictures").mkdir()
    notebooks = [Notebook(path) for path in sorted((ROOT/"nbs").glob("*.ipynb"))]
    writer = Writer(folder, notebooks)
    for book in notebooks: writer.notebook(book)
    writer.api()
    examples(folder)
    for source, page in PAGES.items():
        (folder/page).write_text(writer.prose((ROOT/source).read_text(encoding="utf-8")), encoding="utf-8")
    shutil.copytree(ROOT/"figures", folder/"figures", ignore=shutil.ignore_patterns("README.md"))
    shutil.copytree(ROOT/"nbs"/"params", folder/"params")
    for file in (HERE/"pages").iterdir(): shutil.copy(file, folder/file.name)
    findings_page(folder)
    leaderboard_page(folder)
    (folder/"explorer.html").write_text(explorer.page(home="index.html"), encoding="utf-8")
    if explorer.networks(): explorer.ship_networks(folder/"networks")
    return writer


def make(output):
    "Build the whole site."
    with tempfile.TemporaryDirectory() as folder:
        writer = write_pages(Path(folder))
        config = load_config(str(HERE/"mkdocs.yml"), docs_dir=folder, site_dir=str(output.absolute()),
                             nav=navigation(writer.notebooks))
        build(config)
    writer.finish(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder to write")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    make(parser.parse_args().output)
