"""Video files: decoding, sampling of frames, transforms, data sets. Knows files, no models.

PyAV is needed to read files (``pip install "openvclip[video]"``) and imported only then.
"""

from openvclip.errors import VideoOptionError
from openvclip.video import sampling, transforms
from openvclip.video.annotations import Annotations, read_annotations
from openvclip.video.dataset import Failure, VideoDataset, VideoSample
from openvclip.video.decoding import read_clip

__all__ = [
    "Annotations",
    "Failure",
    "VideoDataset",
    "VideoOptionError",
    "VideoSample",
    "read_annotations",
    "read_clip",
    "sampling",
    "transforms",
]
