"""An index of videos, and search by a sentence, an image or a clip."""

from openvclip.search.embedder import VideoEmbedder
from openvclip.search.exporting import export_vectors
from openvclip.search.index import Index
from openvclip.search.moments import Moment
from openvclip.search.page import PageReport, PageSettings, write_page
from openvclip.search.queries import Clip
from openvclip.search.recorded import ModelSource
from openvclip.search.searching import SearchResult, search_index
from openvclip.search.sharded import MergeReport, ShardReport, index_shards, merge_parts
from openvclip.search.snapshots import Block, Snapshot
from openvclip.search.updating import Report
from openvclip.search.windows import Window, WindowOptions
from openvclip.search.writing import CutReport, cut_moments

__all__ = [
    "Block",
    "Clip",
    "CutReport",
    "Index",
    "MergeReport",
    "ModelSource",
    "Moment",
    "PageReport",
    "PageSettings",
    "Report",
    "SearchResult",
    "ShardReport",
    "Snapshot",
    "VideoEmbedder",
    "Window",
    "WindowOptions",
    "cut_moments",
    "export_vectors",
    "index_shards",
    "merge_parts",
    "search_index",
    "write_page",
]
