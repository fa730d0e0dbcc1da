from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from fastnet.data.entries import Entry
from fastnet.errors import InputError

JPEG_SCAN, JPEG_END = b"\xff\xda", b"\xff\xd9"


def image_size(image: bytes, entry: Entry, place: str) -> tuple[int, int]:
    """(height, width) of an image, as encoded. Decodes all of it; raises InputError if that fails."""
    name = entry.where if isinstance(entry.where, str) else entry.name
    try:
        with Image.open(io.BytesIO(image), formats=("JPEG", "PNG")) as picture:
            picture.load()
            # The decoders take a file whose end is missing or zeroed, which DALI may not.
            if picture.format == "PNG":
                ended = b"IEND" in image[-16:]
            else:
                ended = image.rfind(JPEG_END) > image.rfind(JPEG_SCAN)
            size = picture.height, picture.width
    except UnidentifiedImageError as error:
        raise InputError(f"{place}: {name} is neither JPEG nor PNG; remove or convert it") from error
    except Exception as error:  # PIL's decoders raise all kinds of errors on bad data
        raise InputError(f"{place}: {name} is a bad image ({error}); get it again or remove it") from error
    if not ended:
        raise InputError(
            f"{place}: {name} is a truncated image (its end is missing); get it again or remove it"
        )
    return size
