"""Builds the book, a static site of all notebooks with search, that needs no network: neither to build nor to read.

    python tools/book.py [FOLDER]     writes it to _site/ (or FOLDER), and exits 1 at the first sign of a warning or a dead link

The notebooks' stored outputs are shown; nothing runs. Cells with `#| hide` are left out, and so is what `#| echo: false`, `#| output: false` and
`#| include: false` name; the directives themselves are not printed. Sphinx and MyST-NB make the pages, and MathJax, which is copied into the site, draws the formulas. The API reference is made from the package's docstrings. Links to the web are checked for their form only; for the rest, where there is a
network: `python -m sphinx -b linkcheck _site/source OUT`, with the source that `--keep-source` leaves.
"""
import argparse
import configparser
import inspect
import io
import os
import re
import shutil
import sys
import tempfile
from html.parser import HTMLParser
from importlib.metadata import files
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parent))
import readme                                                                    # noqa: E402

ROOT, NBS = readme.ROOT, readme.ROOT / "nbs"
CONFIG = configparser.ConfigParser(delimiters=["="], inline_comment_prefixes=None)
CONFIG.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = CONFIG["DEFAULT"]
PARTS = [("Find your way", ["which_function", "glossary"]), ("Tutorials", "tutorials/*"), ("How it works, module by module", "[0-9][0-9]_*"), ("What it costs and how right it is", "benchmarks/*"), ("Reference", ["api", "references", "changelog"])]

CONF = '''
project, author, html_title, language = {name!r}, {author!r}, {name!r}, "en"
extensions = ["myst_nb", "sphinx.ext.mathjax"]
html_theme, html_show_copyright, html_copy_source, html_static_path = "furo", False, False, ["_static"]
html_css_files = ["own.css"]
mathjax_path = "mathjax/tex-chtml-full.js"
html_theme_options = {{"source_repository": {git!r}, "source_branch": {branch!r}, "source_directory": "nbs/"}}
nb_execution_mode, nb_merge_streams, nb_output_stderr, nb_render_markdown_format = "off", True, "remove", "gfm"
myst_enable_extensions, myst_heading_anchors, myst_dmath_double_inline = ["dollarmath", "amsmath"], 4, True
exclude_patterns, suppress_warnings = [], ["mystnb.unknown_mime_type"]
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]

def no_source(app, page, template, context, doctree):
    if page in ("api", "changelog"): context["page_source_suffix"] = None      # made here: there is no such file to view or edit

def setup(app): app.connect("html-page-context", no_source)
'''

CSS = """
div.math {overflow-x: auto; padding: .4em 0}
.content {width: 51em; max-width: 100%}
.cell_output {overflow-x: auto} .cell_output table {border: 0; border-collapse: collapse; font-size: .85em; font-variant-numeric: tabular-nums; margin: .5em 0}
.cell_output table :is(th, td) {border: 0; padding: .25em .6em; text-align: right; vertical-align: top} .cell_output table tbody th {text-align: left}
.cell_output table thead {border-bottom: 1px solid var(--color-foreground-border)} .cell_output table tbody tr:nth-child(even) {background: var(--color-background-secondary)}
body:not([data-theme=light]) .cell_output img {background: #fff; border-radius: 4px}
@media (prefers-color-scheme: light) {body:not([data-theme=dark]) .cell_output img {background: none}}
dl.api dt {margin-top: 1.4em; font-family: var(--font-stack--monospace); overflow-wrap: anywhere}
"""


def shown(nb):
    "A notebook as a page: what is hidden is gone, and so are directives, warnings and what only runs in a kernel."
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "code":
            directives = dict(readme.DIRECTIVE.findall(cell.source))
            if "hide" in directives or "default_exp" in directives or not readme.included(cell): continue
            if alt := readme.obey_directives(cell, keep_styles=True): cell.metadata["mystnb"] = {"image": {"alt": alt}}
            if cell.metadata.pop("transient", None): cell.metadata["tags"] = ["remove-input"]
            if not cell.source.strip() and not cell.outputs: continue
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for o in cell.outputs: o.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
        cells.append(cell)
    nb.cells = cells
    nb.metadata.pop("widgets", None)
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nb


def linked(text, page):
    "Links to files that are no pages lead to the repository."
    def move(match):
        target, mark, anchor = match[2].partition("#")
        file = (page.parent / target).resolve()
        if file.suffix in (".ipynb", ".png") or not target: return match[0]
        if file == ROOT / "CHANGELOG.md": return match[1] + os.path.relpath(NBS / "changelog.md", page.parent) + mark + anchor
        if not file.exists(): raise SystemExit(f"{page.relative_to(ROOT)}: {target} does not exist")
        return f"{match[1]}{SETTINGS['git_url']}/blob/{SETTINGS['branch']}/{file.relative_to(ROOT).as_posix()}{mark}{anchor}"
    return readme.outside_code(lambda part: readme.LINK.sub(move, part), text)


def api():
    "The API reference in Markdown: every public name, by module, with signature and docstring."
    import importlib

    import dit_nb
    lines, seen = ["# API reference", "", f"Everything that `from dit_nb import *` brings, by the module, and the notebook, that it comes from: {len(dit_nb.__all__)} names. "
                   "What a module has beyond that stands in its notebook.", ""], set()
    of = {}
    for name in dit_nb.__all__: of.setdefault(getattr(dit_nb, name).__module__.rpartition(".")[2], []).append(name)
    books = {re.search(r"#\|\s*default_exp\s+(\S+)", p.read_text(encoding="utf-8"))[1].strip('\\n",'): p.stem for p in sorted(NBS.glob("[0-9]*.ipynb")) if "default_exp" in p.read_text(encoding="utf-8")}
    for module in sorted(of, key=lambda m: books.get(m, m)):
        doc = (importlib.import_module(f"dit_nb.{module}").__doc__ or "").strip()
        lines += [f"## {module}", "", doc, "", f"Notebook: [{books[module]}]({books[module]}.ipynb)", ""]
        for name in of[module]:
            f = getattr(dit_nb, name)
            seen.add(name)
            lines += [f"### {name}", "", "```python", signature(name, f), "```", "", docstring(f), ""]
            if not inspect.isclass(f): continue
            for method, g in methods(f): lines += [f"**`{signature(method, g) if inspect.isfunction(g) else method}`**: {docstring(g)}", ""]
    assert seen == set(dit_nb.__all__)
    return "\n".join(lines) + "\n"


def methods(cls):
    "The documented public methods and properties of a class, those that it inherits from the package's classes too."
    found = {name: g for base in reversed(cls.__mro__) if base.__module__.startswith("dit_nb") for name, g in vars(base).items()}
    for name, g in found.items():
        g = getattr(g, "__func__", g)                                            # of class and static methods
        if not name.startswith("_") and (inspect.isfunction(g) or isinstance(g, property) or hasattr(g, "attrname")) and g.__doc__: yield name, g


def signature(name, f):
    try: return f"{name}{re.sub(r'<(?:function|class) [^>]+>', '...', str(inspect.signature(f)))}".replace("(self, ", "(").replace("(self)", "()")
    except (TypeError, ValueError): return name


def docstring(f): return re.sub(r"<(?=[A-Za-z])", "&lt;", inspect.cleandoc(f.__doc__ or "").strip())


def source(folder):
    "Write what Sphinx reads."
    for path in sorted(NBS.rglob("*.ipynb")):
        if any(part.startswith((".", "_")) for part in path.relative_to(NBS).parts): continue
        nb = shown(nbformat.read(path, as_version=4))
        for cell in nb.cells:
            if cell.cell_type == "markdown": cell.source = linked(cell.source, path)
        if path == readme.INDEX: nb.cells.append(nbformat.v4.new_markdown_cell(contents()))
        target = folder / path.relative_to(NBS)
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, target)
    for path in NBS.glob("*.png"): shutil.copy(path, folder)
    (folder / "api.md").write_text(api(), encoding="utf-8")
    (folder / "changelog.md").write_text((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "conf.py").write_text(CONF.format(name=SETTINGS["lib_name"], author=SETTINGS["author"], git=SETTINGS["git_url"], branch=SETTINGS["branch"]), encoding="utf-8")
    for file in files("sphinx-mathjax-offline"):
        name = file.as_posix().partition("static/mathjax/")[2]
        if name == "tex-chtml-full.js" or name.startswith("output/chtml/fonts/"):
            (folder / "_static/mathjax" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), folder / "_static/mathjax" / name)
    (folder / "_static/own.css").write_text(CSS, encoding="utf-8")


def contents():
    "The tables of contents, in the order in which the book is read"
    blocks = []
    for title, pages in PARTS:
        if isinstance(pages, str): pages = [p.relative_to(NBS).with_suffix("").as_posix() for p in sorted(NBS.glob(f"{pages}.ipynb"))]
        pages = [p for p in pages if (NBS / f"{p}.ipynb").exists() or p in ("api", "changelog")]
        blocks.append(f"```{{toctree}}\n:caption: {title}\n:hidden:\n\n" + "\n".join(pages) + "\n```")
    return "\n\n".join(blocks)


class Links(HTMLParser):
    "The links and anchors of a page"
    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if "id" in a: self.anchors.add(a["id"])
        self.links += [a[k] for k in ("href", "src") if a.get(k) and tag != "use"]


def dead(site):
    "What is wrong with the links of the built pages, in words"
    pages, found = {p: Links(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))}, []
    for page, p in pages.items():
        for link in p.links:
            url = urlsplit(link)
            if url.scheme in ("data", "mailto"): continue
            if link.startswith(SETTINGS["git_url"] + "/"):
                file = re.sub(r"^(?:blob|edit)/[^/]+/", "", unquote(url.path[len(urlsplit(SETTINGS["git_url"]).path) + 1:]))
                if not (ROOT / file).exists(): found.append(f"{page.relative_to(site)}: {link} is not in the repository")
                continue
            if url.scheme or url.netloc:
                if url.scheme != "https" or "." not in url.netloc or "example" in url.netloc: found.append(f"{page.relative_to(site)}: {link} is no address of the web")
                continue
            target = page if not url.path else (page.parent / unquote(url.path)).resolve()
            if target.is_dir(): target /= "index.html"
            if not target.exists(): found.append(f"{page.relative_to(site)}: {link} leads nowhere")
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].anchors: found.append(f"{page.relative_to(site)}: {link} has no such anchor")
    return found


def build(site, keep=False):
    "Build the site into the folder `site`; returns what is wrong with it, a list of texts."
    from sphinx.application import Sphinx
    site = Path(site).resolve()
    shutil.rmtree(site, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        src, warnings = Path(work) / "source", io.StringIO()
        src.mkdir()
        source(src)
        made = Path(work) / "site"                                               # MyST-NB leaves its pictures in a folder beside the site
        Sphinx(src, src, made, Path(work) / "doctrees", "html", status=None, warning=warnings).build()
        shutil.copytree(made, site)
        if keep: shutil.copytree(src, site / "source")
    shutil.rmtree(site / ".doctrees", ignore_errors=True)
    (site / ".nojekyll").touch()
    said = re.sub(r"\x1b\[[0-9;]*m", "", warnings.getvalue()).splitlines()
    return [line.replace(f"{src}/", "") for line in said if line.strip()] + dead(site)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=ROOT / "_site")
    parser.add_argument("--keep-source", action="store_true", help="leave what Sphinx has read in FOLDER/source")
    args = parser.parse_args()
    wrong = build(args.folder, args.keep_source)
    print(*wrong, sep="\n", file=sys.stderr)
    if wrong: raise SystemExit(f"{len(wrong)} warnings and dead links")
    print(f"{args.folder}: {sum(1 for _ in Path(args.folder).rglob('*.html'))} pages, no warning, no dead link. Open {Path(args.folder) / 'index.html'}")


if __name__ == "__main__": main()
