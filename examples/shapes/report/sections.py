"""The sections of the page: what each study asks, and what the paper says of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from examples.shapes import studies
from examples.shapes.report.statements import Claim, Point
from examples.shapes.studies import Study


@dataclass(frozen=True)
class Section:
    """A study on the page.

    Attributes:
        study: its rows and seeds.
        title: of the section.
        text: what is compared.
        claims: of the paper, to be judged by the results.
        default: the row that the others are compared with, where the paper claims nothing.
        called: what the default row is called in a sentence.
        tabulated: whether it has a table of its own.
        figure: file name of the curves' figure.
        curves: their names in it, by row.
        seconds: whether the table says how long a step takes.
    """

    study: Study
    title: str
    text: str
    claims: tuple[Claim, ...] = ()
    default: str | None = None
    called: str = ""
    tabulated: bool = True
    figure: str | None = None
    curves: dict[str, str] = field(default_factory=dict)
    seconds: bool = False


def _tail(label: str) -> Point:
    return Point(label, 0.0)


def _curves(better: str, worse: str, names: tuple[str, str]) -> Claim:
    text = f"the curve of {names[0]} lies above that of {names[1]}"
    return Claim(text, Point(better), Point(worse), "curve")


def _sizes() -> tuple[Claim, ...]:
    claims = []
    for size in ("tiny", "small", "wider"):
        clip, plain, ours = (f"{row}, {size}" for row in ("CLIP", "FINE-TUNE", "Open-VCLIP"))
        claims += [
            Claim(
                f"{size}: Open-VCLIP is better than CLIP on unseen shapes", Point(ours), Point(clip)
            ),
            Claim(
                f"{size}: Open-VCLIP is better than fine-tuning on unseen shapes",
                Point(ours),
                _tail(plain),
            ),
        ]
    for small, large in (("tiny", "small"), ("small", "wider")):
        for row, lam in (("CLIP", None), ("Open-VCLIP", 0.5)):
            claims.append(
                Claim(
                    f"{row} is better on unseen shapes with the {large} backbone than with the "
                    f"{small} one",
                    Point(f"{row}, {large}", lam),
                    Point(f"{row}, {small}", lam),
                )
            )
    return tuple(claims)


MAIN = Section(
    studies.MAIN,
    "The methods",
    "Each run of the trainer gives two rows, its last weights and its average: FINE-TUNE and SWA "
    "come from one run, IWR and Open-VCLIP from another. L2 has a weight of 0.01. The paper's "
    "Open-VCLIP is at λ = 0.5, its fine-tuning without interpolation at λ = 0.",
    (
        Claim(
            "Open-VCLIP (λ = 0.5) is better than CLIP on unseen shapes",
            Point("Open-VCLIP"),
            Point("CLIP"),
        ),
        Claim(
            "Open-VCLIP (λ = 0.5) is better than fine-tuning (λ = 0) on unseen shapes",
            Point("Open-VCLIP"),
            _tail("FINE-TUNE"),
        ),
        Claim(
            "Open-VCLIP is better than fine-tuning on unseen shapes, both at λ = 0.5",
            Point("Open-VCLIP"),
            Point("FINE-TUNE"),
        ),
        Claim(
            "Open-VCLIP is better than fine-tuning on seen shapes, both at λ = 0.5",
            Point("Open-VCLIP"),
            Point("FINE-TUNE"),
            "seen_test",
        ),
    ),
)

FIGURE_2 = Section(
    studies.TEMPORAL,
    "Attention over frames and interpolation (Figure 2)",
    "CLIP fine-tuned frame by frame, VCLIP (the same with attention over the neighbouring frames, "
    "FINE-TUNE above) and Open-VCLIP, along λ. The tails of the curves are at λ = 0.",
    (
        Claim(
            "at its tail VCLIP is better than CLIP on seen shapes",
            _tail("FINE-TUNE"),
            _tail("CLIP, fine-tuned"),
            "seen_test",
        ),
        Claim(
            "at its tail VCLIP is better than CLIP on unseen shapes",
            _tail("FINE-TUNE"),
            _tail("CLIP, fine-tuned"),
        ),
        _curves("FINE-TUNE", "CLIP, fine-tuned", ("VCLIP", "CLIP")),
        _curves("Open-VCLIP", "FINE-TUNE", ("Open-VCLIP", "VCLIP")),
        _curves("Open-VCLIP", "CLIP, fine-tuned", ("Open-VCLIP", "CLIP")),
    ),
    figure="shapes-figure2.png",
    curves={
        "CLIP": "CLIP, not fine-tuned",
        "CLIP, fine-tuned": "CLIP, frame by frame",
        "FINE-TUNE": "VCLIP",
        "Open-VCLIP": "Open-VCLIP",
    },
)

FIGURE_3 = Section(
    studies.PARTS,
    "IWR and SWA (Figure 3)",
    "Neither (FINE-TUNE), one of them, or both (Open-VCLIP), along λ; the rows are in the first "
    "table.",
    (
        _curves("IWR", "FINE-TUNE", ("IWR alone", "neither")),
        _curves("SWA", "FINE-TUNE", ("SWA alone", "neither")),
        _curves("Open-VCLIP", "SWA", ("both", "SWA alone")),
        _curves("Open-VCLIP", "IWR", ("both", "IWR alone")),
        Claim(
            "at λ = 0.5 IWR is better than neither on seen shapes",
            Point("IWR"),
            Point("FINE-TUNE"),
            "seen_test",
        ),
        Claim(
            "at λ = 0.5 IWR is better than neither on unseen shapes",
            Point("IWR"),
            Point("FINE-TUNE"),
        ),
    ),
    tabulated=False,
    figure="shapes-figure3.png",
    curves={"FINE-TUNE": "neither", "IWR": "IWR", "SWA": "SWA", "Open-VCLIP": "both"},
)

SECTIONS: tuple[Section, ...] = (
    MAIN,
    FIGURE_2,
    FIGURE_3,
    Section(
        studies.BACKBONES,
        "Three sizes of backbone (Table 4)",
        "The image tower of the model above is *small* (4 layers of width 96); *tiny* has 2 layers "
        "of width 64, *wider* 4 of width 128. All have the small model's text tower, and name 75 "
        "(tiny), 93 (small) and 98 % (wider) of held-out stills rightly. As in the paper, "
        "fine-tuning is at λ = 0 and Open-VCLIP at λ = 0.5 in the sentences.",
        _sizes(),
    ),
    Section(
        studies.PENALTY,
        "L2 regularisation (Table 5)",
        "Plain fine-tuning with the squared distance to CLIP, times a weight, added to the loss. "
        "Each row is compared at the λ that is chosen on the development shapes, and so is the "
        "weight.",
        (
            Claim(
                "Open-VCLIP is better than L2 regularisation on seen shapes",
                Point("Open-VCLIP", None),
                Point("L2", None),
                "seen_test",
            ),
            Claim(
                "Open-VCLIP is better than L2 regularisation on unseen shapes",
                Point("Open-VCLIP", None),
                Point("L2", None),
            ),
        ),
        seconds=True,
    ),
    Section(
        studies.WEIGHT,
        "The weight C of the regulariser",
        "The paper takes C = 0.5 and shows no other.",
        default="C = 0.5",
        called="the paper's C = 0.5",
    ),
    Section(
        studies.INTERVAL,
        "The interval of α",
        "The paper draws α from (0, 0.6) and shows no other interval.",
        default="α in (0, 0.6)",
        called="the paper's interval (0, 0.6)",
    ),
    Section(
        studies.AVERAGING,
        "Where the averaging begins, and its cycle",
        "Epochs before the averaging begins, and epochs from one averaged model to the next. The "
        "paper begins after the warm-up and averages once an epoch; the experiment here begins "
        "after 10 of 20 epochs and averages four times an epoch. All these averages are of one "
        "run.",
        default="after 10, cycle 1/4",
        called="after 10, cycle 1/4",
    ),
    Section(
        studies.BOUNDARY,
        "What the first and the last frame see beyond the clip",
        "The released code puts zero keys and values there. *mask* gives these places no weight, "
        "*replicate* repeats the end frame.",
        default="zero",
        called="zero",
    ),
    Section(
        studies.EVERY,
        "The regulariser in every step, or in some",
        "The paper regularises each step, which doubles its cost. What every 4th step saves is in "
        "[the benchmarks](benchmarks.md#a-regularised-step).",
        default="every step",
        called="regularising each step",
    ),
    Section(
        studies.FIXED,
        "α drawn or fixed",
        "The paper draws α anew for each step; fixed, it is the interval's middle.",
        default="α drawn from (0, 0.6)",
        called="drawing it anew",
    ),
)
