"""Weight-space training inside the training loops of other libraries.

Each module belongs to one library and needs this library to be installed:
``openvclip.integrations.transformers`` is for the ``Trainer`` of Hugging Face,
``openvclip.integrations.lightning`` for the ``Trainer`` of Lightning, and
``openvclip.integrations.accelerate`` for loops of Hugging Face's accelerate.
"""
