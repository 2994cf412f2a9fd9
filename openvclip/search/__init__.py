"""An index of videos, and search by a sentence, an image or a clip."""

from openvclip.search.embedder import VideoEmbedder
from openvclip.search.index import Index
from openvclip.search.moments import Moment
from openvclip.search.recorded import ModelSource
from openvclip.search.sharded import MergeReport, ShardReport, index_shards, merge_parts
from openvclip.search.storage import Block, Snapshot
from openvclip.search.updating import Report
from openvclip.search.windows import Window, WindowOptions

__all__ = [
    "Block",
    "Index",
    "MergeReport",
    "ModelSource",
    "Moment",
    "Report",
    "ShardReport",
    "Snapshot",
    "VideoEmbedder",
    "Window",
    "WindowOptions",
    "index_shards",
    "merge_parts",
]
