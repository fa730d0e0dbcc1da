#!/bin/sh
# Installs what the other projects' loaders need from Debian 12 (FFCV: libjpeg-turbo and OpenCV to build with; SPDL:
# FFmpeg), then the loaders and timm beside the project's own packages, whose versions stay.
set -eu
cd "$(dirname "$0")/.."
apt-get install -y --no-install-recommends g++ pkg-config libturbojpeg0-dev libopencv-dev libavdevice59 libavfilter8
.venv/bin/pip install --disable-pip-version-check -q -c constraints.txt -e '.[bench]'
