"""Image towers with prompts.

:mod:`openvclip.prompting.towers.prompted` says what prompts ask of a tower. Beside it there is one
module for each family of :mod:`openvclip.adapters`, under the name of the family, with the classes
that its towers have once prompts are attached. A module imports the library that its towers come
from, so it is imported only where a model holds such a tower.
"""
