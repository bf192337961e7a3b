"""``structgrad-evaluate`` of this checkout."""

import sys

from structgrad.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
