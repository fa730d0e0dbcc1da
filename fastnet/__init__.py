"""fastnet: Tiny ImageNet training with a DALI pipeline and fused channel-group LSTMs."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

__version__ = "0.1.0"


def _interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.exit("interrupted")
    sys.__excepthook__(kind, error, trace)


# A command imports for seconds before `cli.run_command` handles Ctrl-C. Started by -m, argv[0] is still "-m" here.
if sys.argv[0] == "-m" or Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:
    sys.excepthook = _interrupted

if find_spec("fastnet_kernels") is None:
    # An uninstalled checkout: kernels/ is a source root of its own.
    sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels"))
