"""``structgrad-sweep`` of this checkout."""

import sys

from structgrad.commands.sweep import main

if __name__ == "__main__":
    sys.exit(main())
