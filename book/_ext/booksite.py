"""What this site changes in a stock Jupyter Book: it reads offline, without a request to another host.

* MathJax is copied out of the package ``sphinx-mathjax-offline`` and loaded by relative path, so that
  pages opened from disk (file://) show formulas too.
* Live-code scripts (thebe) are dropped: they point at a CDN, and each page would report an error.
* The list of references gets the ARIA role its items need.
* ``book/_static`` holds the style sheet, a script that lets long formulas scroll, and the icon.
"""

import importlib.util
import re
import shutil
from pathlib import Path

MATHJAX_PARTS = ["tex-chtml.js", "input/tex/extensions", "output/chtml/fonts/woff-v2"]
THEBE = re.compile(r'<script type="text/x-thebe-config">.*?</script>\s*(<script>\s*kernelName = .*?</script>)?', re.S)


def copy_mathjax(app):
    """Copy the parts of MathJax that a page can ask for; they are not added to any page by themselves."""
    if app.builder.format != "html":
        return
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    source = Path(package.origin).parent / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    for part in MATHJAX_PARTS:
        destination = target / part
        destination.parent.mkdir(parents=True, exist_ok=True)
        if (source / part).is_dir():
            shutil.copytree(source / part, destination, dirs_exist_ok=True)
        else:
            shutil.copyfile(source / part, destination)


def clean_page(app, pagename, templatename, context, doctree):
    """Drop thebe's scripts, and make every entry of a bibliography an item of its list."""
    context["script_files"] = [
        script for script in context["script_files"]
        if "thebe" not in str(getattr(script, "filename", script) or "").lower()
        and "thebe" not in str(getattr(script, "attributes", {}).get("body", "")).lower()
    ]
    if "body" in context:
        body = THEBE.sub("", context["body"])
        context["body"] = body.replace('role="doc-biblioentry"', 'role="listitem"')


def setup(app):
    app.config.mathjax_path = "mathjax/tex-chtml.js"
    # The menu would fetch parts that are not copied; screen readers get MathML without it.
    app.config.mathjax3_config = {"options": {"enableMenu": False, "enableAssistiveMml": True}}
    app.add_css_file("book.css")
    app.add_js_file("book.js", defer="defer")
    app.connect("builder-inited", copy_mathjax)
    app.connect("html-page-context", clean_page, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
