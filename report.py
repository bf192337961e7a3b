"""``structgrad-report`` of this checkout."""

import sys

from structgrad.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
