"""Makes README.md, and the pictures it shows (images/), from nbs/index.ipynb.

    python tools/readme.py            writes them
    python tools/readme.py --check    exits 1 where they differ from what it would write

Hidden cells are left out as nbdev leaves them out of its pages (`#| hide`, `#| export`), and so is what
`#| echo: false`, `#| output: false` and `#| include: false` name. `#| fig-alt: words` describes a picture.
Relative links stand in the notebook as seen from nbs/ and in README.md as seen from the top folder.
"""
import os
import re
import sys
from pathlib import Path

import nbformat
from execnb.nbio import nb2str, read_nb
from nbconvert import MarkdownExporter
from nbdev.processors import FilterDefaults

ROOT = Path(__file__).resolve().parents[1]
INDEX, README, IMAGES = ROOT / "nbs/index.ipynb", ROOT / "README.md", ROOT / "images"
CODE = re.compile(r"(^```.*?^```[ \t]*$|`[^`\n]+`)", re.M | re.S)       # fenced blocks and inline code
LINK = re.compile(r"""(\]\(|(?:src|href)=["'])(?![a-z]+:|[#/])([^)"'\s]+)""")
DIRECTIVE = re.compile(r"^#\|[ \t]*([\w-]+):?[ \t]*(.*?)[ \t]*(?:\n|\Z)", re.M)


class ForReadme(FilterDefaults):
    "Nbdev's own processors, without those that write for a Quarto site."
    def base_procs(self):
        site = {"FrontmatterProc", "add_show_docs", "exec_show_docs", "add_links", "add_fold", "mv_exports"}
        return [proc for proc in super().base_procs() if proc.__name__ not in site]


def outside_code(change, text):
    "`text` with `change` applied to everything that is not code."
    return "".join(part if i % 2 else change(part) for i, part in enumerate(CODE.split(text)))


def from_top(text):
    "`text` with links that are relative to nbs/ made relative to the top folder."
    def move(match):
        target, mark, anchor = match[2].partition("#")
        path = os.path.relpath(INDEX.parent / target, ROOT).replace(os.sep, "/")
        return match[1] + path + mark + anchor
    return outside_code(lambda part: LINK.sub(move, part), text)


def obey_directives(cell, keep_styles=False):
    "Applies Quarto's directives, which nbconvert would print; returns the picture's description. `keep_styles` keeps the colours of styled tables."
    directives = dict(DIRECTIVE.findall(cell.source))
    cell.source = DIRECTIVE.sub("", cell.source).strip("\n")
    if directives.get("output") == "false": cell.outputs = []
    if directives.get("echo") == "false": cell.metadata["transient"] = {"remove_source": True}
    for output in cell.outputs:
        if "text/html" in output.get("data", {}):               # GitHub would show a style sheet as text; a frame's own (scoped) has no colours
            output.data["text/html"] = re.sub(r"<style scoped.*?</style>\s*" if keep_styles else r"<style.*?</style>\s*", "", output.data["text/html"], flags=re.S)
    return directives.get("fig-alt", "").strip("\"'")


def included(cell): return not re.search(r"^#\|\s*include:\s*false", cell.source, re.M)


def render():
    "README's text and its pictures, `{name: bytes}`."
    nb = read_nb(INDEX)
    ForReadme()(nb)
    nb = nbformat.reads(nb2str(nb), as_version=4)
    nb.metadata["language_info"] = {"name": "python"}
    nb.cells = [cell for cell in nb.cells if cell.cell_type != "code" or included(cell)]
    described = {}
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "code": described[i] = obey_directives(cell)
        elif cell.cell_type == "markdown": cell.source = from_top(cell.source)
    text, resources = MarkdownExporter().from_notebook_node(
        nb, resources={"unique_key": "index", "output_files_dir": IMAGES.name})
    alt = lambda match: f"![{described[int(match[2])] or 'output'}]({match[1]}"
    text = re.sub(rf"!\[\w+\]\(({IMAGES.name}/index_(\d+)_)", alt, text)
    text = outside_code(lambda part: re.sub(r"\n{3,}", "\n\n", part), text).strip() + "\n"
    return text, {Path(name).name: data for name, data in resources["outputs"].items()}


def on_disk():
    "What `render` gave when the files were written."
    text = README.read_text(encoding="utf-8") if README.exists() else None
    return text, {path.name: path.read_bytes() for path in IMAGES.glob("index_*")}


def write():
    "Writes README.md and its pictures, and removes pictures that it no longer shows."
    text, pictures = render()
    README.write_text(text, encoding="utf-8", newline="\n")
    for path in IMAGES.glob("index_*"): path.unlink()
    if pictures: IMAGES.mkdir(exist_ok=True)
    for name, data in pictures.items(): (IMAGES / name).write_bytes(data)


def main():
    os.chdir(ROOT)                                              # nbdev looks for settings.ini from here
    if sys.argv[1:] == ["--check"]:
        if render() != on_disk():
            sys.exit("README.md or images/ differs from nbs/index.ipynb: run `python tools/readme.py`")
    elif sys.argv[1:]: sys.exit(__doc__)
    else: write()


if __name__ == "__main__": main()
