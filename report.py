"""``structgrad-report`` of this checkout."""

from structgrad.commands.report import main

if __name__ == "__main__":
    main()
