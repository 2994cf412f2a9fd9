"""One module for each family of towers that :mod:`openvclip.temporal` can expand.

Each module has a ``FAMILY`` (:class:`openvclip.adapters.family.Family`): which classes of towers
and attentions take the place of which, where a tower keeps its attentions, and how a model of the
family is asked for features. A module imports the library that its towers come from, so
:mod:`openvclip.temporal` imports it only where that library is loaded already.
"""
