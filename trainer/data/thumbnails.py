"""Images small enough to stand in a page: data URLs."""

import base64
import io
from pathlib import Path
from typing import Any

from mede2.trainer.data.images import Window, load_image

LONGEST_PX = 512
JPEG_QUALITY = 85


def thumbnail(path: Path, window: Window = None) -> dict[str, Any]:
    """An image with its longer side at most 512 px, as {"url", "problem"}: a data URL of PNG or JPEG, whichever is
    shorter, or None and why it cannot be shown."""
    try:
        image = load_image(path, window)
    except ValueError as problem:
        return {"url": None, "problem": str(problem)}
    image.thumbnail((LONGEST_PX, LONGEST_PX))
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": JPEG_QUALITY})):
        data = io.BytesIO()
        image.save(data, kind, **options)
        encoded.append((kind, data.getvalue()))
    kind, data = min(encoded, key=lambda one: len(one[1]))
    return {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}", "problem": None}
