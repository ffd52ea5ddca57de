"""``python -m fedunlearn`` is ``fedunlearn``."""

import sys
from pathlib import Path

from fedunlearn.cli import main

if __name__ == "__main__":
    # Python puts the working directory first; what a received folder holds is not to be run.
    if not sys.flags.safe_path and sys.path[:1] == [str(Path.cwd())]:
        del sys.path[0]
    main()
