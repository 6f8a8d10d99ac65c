"""What of a model card is nobody's text: the templates of PEFT and of the Trainer, which ask for what they do not know."""

from __future__ import annotations

import functools
import re

from huggingface_hub import ModelCard, ModelCardData


# the first lines of the template that PEFT fills in (huggingface_hub 1 and 2)
TEMPLATE_TITLE = "# Model Card for Model ID"
# empty sections of the Trainer's card (transformers 5)
EMPTY_SECTION = re.compile(r"^## [^\n]+\n+More information needed\n+(?=#|\Z)", re.MULTILINE)
ASKS = "More Information Needed"


@functools.cache
def _template_lines() -> frozenset[str]:
    text = ModelCard.from_template(ModelCardData()).text
    return frozenset(line.strip() for line in text.splitlines())


def without_template(text: str, title: str) -> str:
    """The text of a card without what a template put there; what somebody wrote stays.

    Args:
        text (`str`): Of the card, without its metadata.
        title (`str`): In place of the template's.
    """
    text = EMPTY_SECTION.sub("", text)
    if TEMPLATE_TITLE not in text:
        return text
    template = _template_lines()
    kept, in_section = [], False
    for line in text.splitlines():
        if line.startswith(("<!-- loqt_peft", "<!-- /loqt_peft")):
            in_section = not line.startswith("<!-- /")
        # filled in by PEFT, these differ from the template's line only by a name
        if not in_section and line.strip() and (line.strip() in template or ASKS in line):
            continue
        kept.append(line)
    body = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
    return f"# {title}\n\n{body}\n" if body else f"# {title}\n"
