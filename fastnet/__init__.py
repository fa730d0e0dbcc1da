"""fastnet: Tiny ImageNet training with a DALI pipeline and fused channel-group LSTMs."""

import sys
from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"

if find_spec("fastnet_kernels") is None:
    # An uninstalled checkout: kernels/ is a source root of its own.
    sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels"))
