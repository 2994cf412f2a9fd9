"""One module for each family of towers that :mod:`openvclip.towers.temporal` can expand.

Each module has a ``FAMILY`` (:class:`openvclip.towers.family.Family`): which classes of towers
and attentions take the place of which, where a tower keeps its attentions, and how a model of the
family is asked for features. A module imports the library that its towers come from, so
:mod:`openvclip.towers.temporal` imports it only where that library is loaded already.
"""
