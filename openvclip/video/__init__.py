"""Video files: decoding, frame sampling, transforms and data sets.

This package uses no models. PyAV is needed to read video files (``pip install
"openvclip[video]"``). It is imported when the first file is read.
"""

from openvclip.video import protocols, retrieval, sampling, transforms
from openvclip.video.ahead import read_clips
from openvclip.video.annotations import Annotations, locate_videos, read_annotations
from openvclip.video.captions import read_captions
from openvclip.video.checking import VideoCheck, check_video, check_videos
from openvclip.video.dataset import Failure, VideoDataset, VideoSample
from openvclip.video.decoding import read_clip
from openvclip.video.files import find_videos
from openvclip.video.names import class_names
from openvclip.video.padding import PaddedSamples, pad_clips, pad_samples
from openvclip.video.sampling import Backend, Sampler, Sampling
from openvclip.video.sliding import SlidingWindow, sliding_windows
from openvclip.video.sources import VideoFrames, VideoSource

__all__ = [
    "Annotations",
    "Backend",
    "Failure",
    "PaddedSamples",
    "Sampler",
    "Sampling",
    "SlidingWindow",
    "VideoCheck",
    "VideoDataset",
    "VideoFrames",
    "VideoSample",
    "VideoSource",
    "check_video",
    "check_videos",
    "class_names",
    "find_videos",
    "locate_videos",
    "pad_clips",
    "pad_samples",
    "protocols",
    "read_annotations",
    "read_captions",
    "read_clip",
    "read_clips",
    "retrieval",
    "sampling",
    "sliding_windows",
    "transforms",
]
