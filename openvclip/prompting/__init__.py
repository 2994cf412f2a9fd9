"""ViFi-CLIP and Vita-CLIP: video fine-tuning of a whole CLIP, and prompts for a frozen one."""

from openvclip.prompting.attach import detach, load_state_dict, parameters, state_dict
from openvclip.prompting.classifier import PHOTO_TEMPLATE, VideoClassifier, encode_video
from openvclip.prompting.files import load, save
from openvclip.prompting.released import load_released, released_state_dict
from openvclip.prompting.vifi import attach_vifi, fine_tune
from openvclip.prompting.vita import attach_vita

__all__ = [
    "PHOTO_TEMPLATE",
    "VideoClassifier",
    "attach_vifi",
    "attach_vita",
    "detach",
    "encode_video",
    "fine_tune",
    "load",
    "load_released",
    "load_state_dict",
    "parameters",
    "released_state_dict",
    "save",
    "state_dict",
]
