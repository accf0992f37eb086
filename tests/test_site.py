"""The built site: complete, offline, without dead links, readable without seeing the pictures.

Each check is a function from a page to a list of complaints; it is first shown to complain about a
broken page, then run over every page of ``_build/html``. ``make test`` builds the site and sets
SITE_REQUIRED=1, so that a missing site is a failure there; elsewhere the page tests are skipped.
"""

import os
import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_build" / "html"
REQUIRED = os.environ.get("SITE_REQUIRED") == "1"

LOADED = {"script": ["src"], "img": ["src", "srcset"], "iframe": ["src"], "source": ["src", "srcset"],
          "video": ["src", "poster"], "audio": ["src"], "object": ["data"], "embed": ["src"],
          "use": ["href", "xlink:href"], "image": ["href", "xlink:href"], "input": ["src"]}
LOADED_LINKS = {"stylesheet", "preload", "prefetch", "modulepreload", "icon", "shortcut", "apple-touch-icon",
                "preconnect", "dns-prefetch", "manifest"}
EXTERNAL = re.compile(r"(?:[a-z]+:)?//", re.I)
EXTERNAL_CSS = re.compile(r"""url\(\s*["']?(?:https?:)?//[^)]*\)|@import\s+(?:url\(\s*)?["']?(?:https?:)?//[^;]*""", re.I)
LEAKS = [re.compile(p) for p in (
    r"\{(?:prf|glue|cite|eq|numref|ref|doc|math|figure|admonition|exercise|solution|tableofcontents)[:}\w-]*\}?[`:]?",
    r"```+\s*\{", r"^:{3,}\s*\{", r"^:label:", r"(?<![\w`])\$\$", r"\{code-cell\}", r"\bWARNING\b:",
    r"\bSystem Message\b")]
FILE_NAME = re.compile(r"[/\\]|\.(?:png|svg|jpe?g|gif|webp)\s*$", re.I)


def parse(html):
    return BeautifulSoup(html, "html.parser")


# --- the checks -------------------------------------------------------------------------------------

def external_requests(soup):
    """Everything the browser would fetch from another host."""
    found = []
    for tag, attributes in LOADED.items():
        for element in soup.find_all(tag):
            found += [f"<{tag} {a}={element[a][:120]}>" for a in attributes if EXTERNAL.search(without_data(element.get(a) or ""))]
    for link in soup.find_all("link"):
        if LOADED_LINKS & {rel.lower() for rel in link.get("rel", [])} and EXTERNAL.match(link.get("href") or ""):
            found.append(f"<link rel={' '.join(link['rel'])} href={link['href']}>")
    for style in soup.find_all("style"):
        found += external_css(style.string or "")
    for element in soup.find_all(style=True):
        found += external_css(element["style"])
    for meta in soup.find_all("meta", attrs={"http-equiv": re.compile("refresh", re.I)}):
        if EXTERNAL.search(meta.get("content") or ""):
            found.append(f"<meta refresh {meta['content']}>")
    return found


def without_data(address):
    """Nothing for a picture that is in the page itself: its base64 may contain anything."""
    return "" if re.fullmatch(r"data:image/\w+;base64,[\w+/=]*", address) else address


def external_css(text):
    return [match.group(0)[:120] for match in EXTERNAL_CSS.finditer(re.sub(r"/\*.*?\*/", "", text, flags=re.S))]


@cache
def anchors(path):
    soup = parse(path.read_text(encoding="utf-8"))
    return {e["id"] for e in soup.find_all(id=True)} | {e["name"] for e in soup.find_all("a", attrs={"name": True})}


def dead_links(soup, page):
    """Relative links whose file or anchor does not exist; ``page`` is the file the links start from."""
    found = []
    for element in soup.find_all("a", href=True):
        parts = urlsplit(element["href"])
        if parts.scheme or parts.netloc:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page.resolve()
        if target.is_dir():
            target = target / "index.html"
        if not target.is_file():
            found.append(f"{element['href']}: no such file")
        elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in anchors(target):
            found.append(f"{element['href']}: no such anchor")
    return found


def missing_local_files(soup, page):
    """Scripts, styles and images that the page loads by relative path and that are not there."""
    found = []
    for element in soup.find_all(["script", "img", "link"]):
        if element.name == "link" and not LOADED_LINKS & {rel.lower() for rel in element.get("rel", [])}:
            continue
        parts = urlsplit(element.get("href" if element.name == "link" else "src") or "")
        if parts.path and not parts.scheme and not parts.netloc and not (page.parent / unquote(parts.path)).is_file():
            found.append(parts.path)
    return found


def bad_alt_texts(soup):
    """Images a reader who does not see them learns nothing about."""
    found, seen = [], set()
    for image in soup.find_all("img"):
        alt = (image.get("alt") or "").strip()
        if not alt or FILE_NAME.search(alt):
            found.append(f"{image.get('src')}: alt is {alt!r}")
        elif content_image(image):
            if alt in seen:
                found.append(f"{image.get('src')}: the alt text {alt!r} is used twice")
            seen.add(alt)
    return found


def content_image(image):
    return image.find_parent("article") is not None or image.find_parent(class_="bd-article") is not None


def math_without_renderer(soup, page):
    """A page with formulas must load a MathJax that is on the disk."""
    if not soup.find(class_="math"):
        return []
    sources = [s["src"] for s in soup.find_all("script", src=True) if "mathjax" in s["src"].lower()]
    if not sources:
        return ["formulas, but no MathJax script"]
    return [s for s in sources if EXTERNAL.match(s) or not (page.parent / urlsplit(s).path).is_file()]


def raw_markup(soup):
    """Directives, roles and warnings that reached the reader as text."""
    soup = parse(str(soup))
    for element in soup.find_all(["script", "style", "pre", "code"]) + soup.find_all(class_="math"):
        element.decompose()
    article = soup.find("article") or soup
    found = []
    for line in article.get_text("\n").splitlines():
        if any(leak.search(line) for leak in LEAKS):
            found.append(line.strip()[:120])
    found += ["an error box of docutils"] * len(soup.find_all(class_="system-message"))
    return found


# --- the checks go red ------------------------------------------------------------------------------

@pytest.mark.parametrize("html", [
    '<script src="https://cdn.example/x.js"></script>',
    '<script src="//cdn.example/x.js"></script>',
    '<link rel="stylesheet" href="https://cdn.example/x.css">',
    '<link rel="preload" href="http://cdn.example/x.woff2">',
    '<link rel="icon" href="https://cdn.example/x.ico">',
    '<img src="https://cdn.example/x.png" alt="x">',
    '<img src="a.png" srcset="https://cdn.example/x.png 2x" alt="x">',
    '<iframe src="https://cdn.example/"></iframe>',
    '<img src="data:image/png;base64,ab==" srcset="https://cdn.example/x.png 2x" alt="x">',
    '<style>@import "https://cdn.example/x.css";</style>',
    '<style>@font-face { src: url("http://cdn.example/x.woff") }</style>',
    '<div style="background: url(//cdn.example/x.png)"></div>',
    '<meta http-equiv="refresh" content="0; url=https://example.org">',
])
def test_external_requests_are_seen(html):
    assert external_requests(parse(html))


def test_local_requests_and_plain_links_pass():
    html = ('<script src="../_static/x.js"></script><link rel="canonical" href="https://example.org/">'
            '<img src="data:image/png;base64,ab//cd==" alt="x"><a href="https://example.org">x</a>'
            '<style>a { background: url(x.png) } /* https://x */</style>')
    assert external_requests(parse(html)) == []


def test_dead_links_are_seen(tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<h1 id="here">x</h1>')
    (tmp_path / "other.html").write_text('<p id="there">x</p>')
    good = '<a href="#here"></a><a href="other.html#there"></a><a href="https://example.org/x"></a>'
    assert dead_links(parse(good), page) == []
    for href in ["gone.html", "#gone", "other.html#gone", "../gone/"]:
        assert dead_links(parse(f'<a href="{href}">x</a>'), page), href


def test_missing_files_are_seen(tmp_path):
    page = tmp_path / "page.html"
    (tmp_path / "x.js").write_text("")
    assert missing_local_files(parse('<script src="x.js?v=1"></script><script>inline</script>'), page) == []
    for html in ['<script src="gone.js"></script>', '<img src="gone.png">', '<link rel="stylesheet" href="gone.css">']:
        assert missing_local_files(parse(html), page), html


@pytest.mark.parametrize("html", [
    '<img src="x.png">', '<img src="x.png" alt="">', '<img src="x.png" alt=" ">', '<img src="x.png" alt="x.png">',
    '<img src="x.png" alt="../_images/abc.png">', '<img src="x.png" alt="_images/abc">',
    '<article><img src="x.png" alt="A curve."><img src="y.png" alt="A curve."></article>',
])
def test_bad_alt_texts_are_seen(html):
    assert bad_alt_texts(parse(html))


def test_good_alt_texts_pass():
    assert bad_alt_texts(parse('<article><img alt="A curve."><img alt="Two curves."></article>')) == []


def test_missing_math_renderer_is_seen(tmp_path):
    page, math = tmp_path / "page.html", '<span class="math">x</span>'
    (tmp_path / "mathjax.js").write_text("")
    assert math_without_renderer(parse(math + '<script src="mathjax.js"></script>'), page) == []
    assert math_without_renderer(parse("<p>no formula</p>"), page) == []
    for script in ["", '<script src="gone/mathjax.js"></script>', '<script src="https://cdn.example/mathjax.js"></script>']:
        assert math_without_renderer(parse(math + script), page), script


@pytest.mark.parametrize("text", [
    "{prf:ref}`thm-x`", "see {glue:text}`value:.2f`", "```{admonition} Title", ":::{note}", ":label: eq-x",
    "{cite:t}`kingma2015adam`", "{eq}`eq-x`", "$$ x $$", "WARNING: duplicate label", "System Message",
])
def test_raw_markup_is_seen(text):
    assert raw_markup(parse(f"<article><p>{text}</p></article>"))
    assert raw_markup(parse(f"<article><pre>{text}</pre></article>")) == []


def test_plain_prose_passes():
    html = "<article><p>A warning: the set {x, y} costs $5, or $10.</p></article>"
    assert raw_markup(parse(html)) == []


# --- the site passes --------------------------------------------------------------------------------

def toc_pages():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    chapters = [c["file"] for part in toc["parts"] for c in part["chapters"]]
    return [toc["root"], *chapters]


PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html") if "_static" not in p.parts)


@pytest.fixture(scope="module")
def site():
    if not (SITE / "index.html").is_file():
        message = "the site is not built: run 'make book'"
        pytest.fail(message) if REQUIRED else pytest.skip(message)
    return SITE


@pytest.mark.parametrize("page", ["index", *toc_pages()])
def test_every_page_of_the_contents_exists(site, page):
    assert (site / f"{page}.html").is_file()


CHECKS = {
    "no external requests": lambda soup, page: external_requests(soup),
    "no dead links": dead_links,
    "no missing files": missing_local_files,
    "alt texts": lambda soup, page: bad_alt_texts(soup),
    "math renderer": math_without_renderer,
    "no raw markup": lambda soup, page: raw_markup(soup),
}


@pytest.mark.parametrize("page", PAGES)
def test_page(site, page):
    soup = parse((site / page).read_text(encoding="utf-8"))
    complaints = {name: found for name, check in CHECKS.items() if (found := check(soup, site / page))}
    assert not complaints


def test_styles_fetch_nothing(site):
    found = {p.relative_to(site).as_posix(): bad for p in site.rglob("*.css")
             if (bad := external_css(p.read_text(encoding="utf-8", errors="replace")))}
    assert not found


def test_contents_page_has_a_language_and_a_title(site):
    for page in toc_pages():
        soup = parse((site / f"{page}.html").read_text(encoding="utf-8"))
        assert soup.html.get("lang") and soup.title.get_text(strip=True), page
