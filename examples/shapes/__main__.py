"""The whole method on a small world: ``python -m examples.shapes --out shapes-out``."""

from examples.shapes.run import main

if __name__ == "__main__":
    main()
