"""Compare the methods in the shapes world: ``python -m examples.shapes.trials``."""

from examples.shapes.trials.command import main

if __name__ == "__main__":
    main()
