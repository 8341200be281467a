"""Formulas become MathML while the site is built; browsers draw MathML without scripts."""

import html
import re

from latex2mathml.converter import convert

# The elements that the Markdown extension arithmatex makes of $...$ and of $$...$$.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)
# Browsers ignore `mathvariant`, but the bold digit is a separate character.
BOLD_ONE = r"\mathbf{1}", "\N{MATHEMATICAL BOLD DIGIT ONE}"
# The converter splits names of functions that contain a digit.
SPLIT_NAME = re.compile(r"<mo /><mrow>((?:<m[in]>\w</m[in]>)+)</mrow>")
# An operator has space on both sides, as a relation has; an identifier has none.
NAME = re.compile(r"<(m[io])>([A-Za-z]\w+)</\1>(<mo stretchy=\"false\">&#x00028;)?")
# A minus after an operator, unless this closes a bracket, is a sign and has no space after it.
SIGN = re.compile(r"(<mo[^>]*>(?!&#x00029;|&#x0005D;|&#x027E9;)[^<]*</mo>)<mo>&#x02212;</mo>")
# The elements that may be multiplied with a name from the left.
FACTORS = ("</mi>", "</mn>", "</msub>", "</msup>", "</msubsup>", "&#x00029;</mo>")
TIGHT = {
    "<mo>/</mo>": '<mo lspace="0" rspace="0">/</mo>',
    "<mo>&#x02202;</mo>": "<mi>&#x02202;</mi>",
}


def on_page_content(content: str, **_) -> str:
    """The page with every formula as MathML."""
    return FORMULA.sub(_formula, content)


def _formula(match: re.Match[str]) -> str:
    if match[1] == "div":
        return f'<div class="formula">{mathml(html.unescape(match[2]), "block")}</div>'
    return mathml(html.unescape(match[2]), "inline")


def mathml(latex: str, display: str) -> str:
    """The MathML of a formula, with the spaces of TeX around names of functions."""
    math = convert(latex.strip().replace(*BOLD_ONE), display=display)
    math = SPLIT_NAME.sub(lambda m: f"<mo>{re.sub('<[^>]+>', '', m[1])}</mo>", math)
    for loose, tight in TIGHT.items():
        math = math.replace(loose, tight)
    math = SIGN.sub(r'\1<mo form="prefix">&#x02212;</mo>', math)
    return NAME.sub(_name, math)


def _name(match: re.Match[str]) -> str:
    before, after = match.string[: match.start()], match[3] or ""
    left = "0.167em" if before.endswith(FACTORS) else "0"
    right = "0" if after else "0.167em"
    return f'<mo lspace="{left}" rspace="{right}">{match[2]}</mo>{after}'
