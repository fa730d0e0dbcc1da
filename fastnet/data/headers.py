"""Headers of JPEGs, by one parser that Python runs for one image, and numba for many without the interpreter's lock.

The loader reads the header of every image in its first epoch. In Python, its threads would have to take turns.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_SCANS = (
    256  # DALI's own limit for progressive JPEGs, whose every scan costs as much as decoding the image
)
DAMAGED, CUT_OFF = -1, -2


def jpeg_header(image: Any) -> tuple[int, int, int]:
    """(height, width, colour components) of a JPEG, or (`DAMAGED` or `CUT_OFF`, 0, 0).

    `image`: bytes or [N] uint8, which begin as a JPEG does. Markers: ITU-T T.81, table B.1.
    """
    at = 2
    while True:
        while at + 1 < len(image) and image[at] == 0xFF and image[at + 1] == 0xFF:
            at += 1  # fill bytes may precede a marker
        if at + 4 > len(image):
            return CUT_OFF, 0, 0
        marker, length = image[at + 1], image[at + 2] << 8 | image[at + 3]
        if image[at] != 0xFF or marker < 0xC0 or 0xD0 <= marker <= 0xD9 or marker == 0xDA or length < 2:
            return DAMAGED, 0, 0
        if marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # SOF0 to SOF15
            if at + 10 > len(image):
                return CUT_OFF, 0, 0
            height = image[at + 5] << 8 | image[at + 6]
            width = image[at + 7] << 8 | image[at + 8]
            return height, width, image[at + 9]
        at += 2 + length


def _read_headers(
    mapped: NDArray[np.uint8],
    bounds: NDArray[np.int64],
    sizes: NDArray[np.int32],
    components: NDArray[np.int32],
) -> None:
    for n in range(len(bounds)):
        components[n] = -1
        image = mapped[bounds[n, 0] : bounds[n, 1]]
        if len(image) < 3 or image[0] != 0xFF or image[1] != 0xD8 or image[2] != 0xFF:
            continue
        height, width, found = jpeg_header(image)
        if height != sizes[n, 0] or width != sizes[n, 1]:
            continue
        scans = 0
        for i in range(len(image) - 1):
            scans += (image[i] == 0xFF) & (image[i + 1] == 0xDA)
        if scans <= MAX_SCANS:
            components[n] = found


@cache
def compiled() -> Any:
    """A function of `mapped` [bytes], the `bounds` [N, 2] of images in it, their `sizes` [N, 2] and `components` [N].

    It fills `components` with the colour components of JPEGs that have these sizes, and with -1 for what needs a
    closer look (`image.check_header`).
    """
    # Imported here, as preparing a set, which reads headers in Python, need not wait for numba.
    from numba.extending import register_jitable

    from fastnet.jit import compile_for, jit

    register_jitable(jpeg_header)
    read_headers = jit()(_read_headers)
    mapped = np.zeros(1, np.uint8)
    mapped.flags.writeable = False
    bounds, sizes, components = np.zeros((1, 2), np.int64), np.zeros((1, 2), np.int32), np.zeros(1, np.int32)
    compile_for(
        read_headers, mapped, bounds, sizes, components, what="data: compiled the reading of JPEG headers"
    )
    return read_headers
