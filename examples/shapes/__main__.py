"""Run the whole method in the shapes world: ``python -m examples.shapes --out shapes-out``."""

from examples.shapes.run import main

if __name__ == "__main__":
    main()
