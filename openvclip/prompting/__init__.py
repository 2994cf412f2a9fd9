"""ViFi-CLIP and Vita-CLIP: fine-tuning a whole CLIP on videos, and prompts for a frozen CLIP."""

from openvclip.prompting.attach import detach, load_state_dict, parameters, state_dict
from openvclip.prompting.classifier import PHOTO_TEMPLATE, VideoClassifier, mean_pooled_features
from openvclip.prompting.files import load, save
from openvclip.prompting.released import load_released, released_state_dict
from openvclip.prompting.text import NamePosition
from openvclip.prompting.vifi import Trained, attach_vifi, fine_tune
from openvclip.prompting.vita import OtherLength, attach_vita

__all__ = [
    "PHOTO_TEMPLATE",
    "NamePosition",
    "OtherLength",
    "Trained",
    "VideoClassifier",
    "attach_vifi",
    "attach_vita",
    "detach",
    "fine_tune",
    "load",
    "load_released",
    "load_state_dict",
    "mean_pooled_features",
    "parameters",
    "released_state_dict",
    "save",
    "state_dict",
]
