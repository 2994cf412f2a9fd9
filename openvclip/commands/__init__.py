"""What all commands share: standard streams, progress, and the reading of a command line.

``openvclip`` and the example scripts are commands. This room knows no model, no file of weights
and no video.
"""
