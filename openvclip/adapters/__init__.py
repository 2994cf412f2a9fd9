"""One module for each family of towers that :mod:`openvclip.temporal` can expand.

Each module has ``find_tower(model) -> nn.Module | None``, which looks at types alone and never
imports a library that the model does not come from, and ``expand(tower, window)`` /
``restore(tower)``, which change and change back the classes of the tower's modules in place.
"""
