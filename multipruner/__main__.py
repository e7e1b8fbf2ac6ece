"""``python -m multipruner``."""

from __future__ import annotations

import sys

from multipruner.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
