"""Compare the methods in the shapes world: ``python -m examples.shapes --out shapes-out``."""

from examples.shapes.trials.command import main

if __name__ == "__main__":
    main()
