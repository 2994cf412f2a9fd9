"""The figures that the Open-VCLIP paper prints, to be shown beside one's own.

Top-1 accuracy in % (top-5 where that is said). Tables 1 to 3 have Open-VCLIP on all protocols,
Table 4 adds CLIP frame by frame and plain fine-tuning, Table 5 the L2 penalty and Kinetics-400.
"""

from __future__ import annotations

ENCODERS = {
    "ViT-B-32-quickgelu": "ViT-B/32",
    "ViT-B-16-quickgelu": "ViT-B/16",
    "ViT-L-14-quickgelu": "ViT-L/14",
}
"""What the paper calls the models of open_clip that it starts from, with OpenAI's weights."""

COLUMNS = (
    *("ucf101-ep1", "ucf101-ep2", "ucf101-ep3"),
    *("hmdb51-ep1", "hmdb51-ep2", "hmdb51-ep3"),
    *("kinetics600", "kinetics600 top-5", "kinetics400"),
)

_ROWS = """
CLIP       ViT-B/32 -        69.1 -        -        45.4 -        64.8     -        -
CLIP       ViT-B/16 -        74.2 -        -        47.6 -        68.1     -        -
CLIP       ViT-L/14 -        80.5 -        -        55.0 -        76.2     -        -
FINE-TUNE  ViT-B/32 -        78.0 -        -        47.3 -        62.8     -        -
FINE-TUNE  ViT-B/16 -        79.7 -        -        49.2 -        65.9     -        -
FINE-TUNE  ViT-L/14 -        85.0 -        -        51.9 -        74.9     -        -
L2         ViT-B/16 -        82.3 -        -        51.2 -        72.0±0.7 -        76.7
Open-VCLIP ViT-B/32 87.1±2.4 79.5 79.4±1.1 62.3±4.0 49.9 50.6±0.3 69.5±0.6 91.7±0.1 -
Open-VCLIP ViT-B/16 89.9±1.7 83.5 83.4±1.2 64.5±4.5 53.2 53.9±1.2 73.0±0.8 93.2±0.1 78.9
Open-VCLIP ViT-L/14 93.1±1.9 87.9 87.6±1.2 68.5±4.0 58.3 59.0±0.6 81.1±0.8 96.3±0.3 -
"""

PUBLISHED: dict[tuple[str, str], dict[str, str]] = {
    (method, encoder): dict(zip(COLUMNS, values, strict=True))
    for method, encoder, *values in map(str.split, _ROWS.strip().splitlines())
}
"""Texts by method and encoder, then by column; ``"-"`` where the paper has none."""

METHODS = tuple(dict.fromkeys(method for method, _ in PUBLISHED))


def published(method: str, model: str, column: str) -> str:
    """The paper's figure for a model of open_clip, ``"-"`` where it has none.

    Args:
        method: one of :data:`METHODS`.
        model: its name, such as ``"ViT-B-16-quickgelu"``.
        column: one of :data:`COLUMNS`.
    """
    return PUBLISHED.get((method, ENCODERS.get(model, "")), {}).get(column, "-")
