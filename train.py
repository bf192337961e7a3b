"""``structgrad-train`` of this checkout."""

from structgrad.commands.train import main

if __name__ == "__main__":
    main()
