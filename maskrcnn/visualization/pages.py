"""Self-contained HTML pages: jinja2 templates that escape all text, one style for all pages, and inline pictures."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

QUALITY = 75  # of the JPEG files


def page_template(path: Path) -> Template:
    """Return a template in which text is escaped. It may include `page_style.css.jinja`."""
    environment = Environment(
        loader=FileSystemLoader([path.parent, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(path.name)


def data_uri(picture: np.ndarray) -> str:
    """Return a picture, (h, w, 3) uint8 RGB, as the data URI of a JPEG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
