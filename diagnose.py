"""``structgrad-diagnose`` of this checkout."""

import sys

from structgrad.commands.diagnose import main

if __name__ == "__main__":
    sys.exit(main())
