"""The sections of the page: the rows of each study, and the claims of the paper about them."""

from __future__ import annotations

from dataclasses import dataclass, field

from examples.shapes import studies
from examples.shapes.report.statements import Claim, Point
from examples.shapes.studies import Study


@dataclass(frozen=True)
class Section:
    """A section of the page, about one study.

    Attributes:
        study: the rows and seeds.
        title: the heading.
        text: the paragraph below the heading.
        claims: the claims of the paper that the results judge.
        default: the label of the row that the other rows are compared with, for a study without
            claims.
        called: the name of the default row in a sentence.
        tabulated: whether the section has a table.
        figure: the file name of the figure.
        curves: the names of the curves in the figure, by the labels of the rows.
        seconds: whether the table has a column with the seconds of a step.
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
    text = f"the curve of {names[0]} lies above the curve of {names[1]}"
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
    "Each run of the trainer gives two rows: the last weights and the average of the weights. One "
    "run gives FINE-TUNE and SWA, another run gives IWR and Open-VCLIP. L2 has a penalty of weight "
    "0.01. The paper reports Open-VCLIP at λ = 0.5, and fine-tuning without interpolation (λ = 0).",
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
    "The figure has three curves along λ: fine-tuned CLIP, VCLIP, and Open-VCLIP. Fine-tuned CLIP "
    "is trained frame by frame. VCLIP is trained with attention over the neighbouring frames; it "
    "is FINE-TUNE in the first table.",
    (
        Claim(
            "at λ = 0 VCLIP is better than fine-tuned CLIP on seen shapes",
            _tail("FINE-TUNE"),
            _tail("CLIP, fine-tuned"),
            "seen_test",
        ),
        Claim(
            "at λ = 0 VCLIP is better than fine-tuned CLIP on unseen shapes",
            _tail("FINE-TUNE"),
            _tail("CLIP, fine-tuned"),
        ),
        _curves("FINE-TUNE", "CLIP, fine-tuned", ("VCLIP", "fine-tuned CLIP")),
        _curves("Open-VCLIP", "FINE-TUNE", ("Open-VCLIP", "VCLIP")),
        _curves("Open-VCLIP", "CLIP, fine-tuned", ("Open-VCLIP", "fine-tuned CLIP")),
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
    "The figure has four curves along λ: FINE-TUNE (*neither* IWR nor SWA), IWR alone, SWA alone, "
    "and Open-VCLIP (*both*). The first table has a row for each of the four methods.",
    (
        _curves("IWR", "FINE-TUNE", ("IWR alone", "FINE-TUNE")),
        _curves("SWA", "FINE-TUNE", ("SWA alone", "FINE-TUNE")),
        _curves("Open-VCLIP", "SWA", ("Open-VCLIP", "SWA alone")),
        _curves("Open-VCLIP", "IWR", ("Open-VCLIP", "IWR alone")),
        Claim(
            "at λ = 0.5 IWR alone is better than FINE-TUNE on seen shapes",
            Point("IWR"),
            Point("FINE-TUNE"),
            "seen_test",
        ),
        Claim(
            "at λ = 0.5 IWR alone is better than FINE-TUNE on unseen shapes",
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
        "The image tower of the model above is *small*: 4 layers of width 96. *tiny* has 2 layers "
        "of width 64, and *wider* has 4 layers of width 128. All three models have the text tower "
        "of *small*. The accuracy on held-out stills is 75 % (tiny), 93 % (small) and 98 % "
        "(wider). As in the paper, the sentences below the table judge fine-tuning at λ = 0 and "
        "Open-VCLIP at λ = 0.5.",
        _sizes(),
    ),
    Section(
        studies.PENALTY,
        "L2 regularisation (Table 5)",
        "L2 is plain fine-tuning with a penalty in the loss: a weight times the squared distance "
        "to CLIP. The sentences below the table compare each method at the λ that is chosen on the "
        "development shapes. The weight of the penalty is chosen on the development shapes too.",
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
        "The paper uses C = 0.5 and reports no other value.",
        default="C = 0.5",
        called="the paper's C = 0.5",
    ),
    Section(
        studies.INTERVAL,
        "The interval of α",
        "The paper draws α from (0, 0.6) and reports no other interval.",
        default="α in (0, 0.6)",
        called="the paper's interval (0, 0.6)",
    ),
    Section(
        studies.AVERAGING,
        "Where the averaging begins, and its cycle",
        "In the table, *after* is the number of epochs before the averaging begins, and *cycle* is "
        "the number of epochs between two averaged models. The paper begins after the warm-up and "
        "averages once an epoch. The experiment here begins after 10 of 20 epochs and averages "
        "four times an epoch. All averages of a seed come from one run.",
        default="after 10, cycle 1/4",
        called="*after 10, cycle 1/4*",
    ),
    Section(
        studies.BOUNDARY,
        "The neighbours of the first and the last frame",
        "The first frame of a clip has no frame before it, and the last frame has no frame after "
        "it. The released code (*zero*) replaces the keys and values of the missing frame by zero. "
        "*mask* gives the missing frame no weight in the attention. *replicate* repeats the first "
        "or the last frame.",
        default="zero",
        called="*zero*",
    ),
    Section(
        studies.EVERY,
        "The regulariser in every step, or in some steps",
        "The paper regularises each step, which doubles the cost of a step. [The "
        "benchmarks](benchmarks.md#a-regularised-step) show the time of a step if only every "
        "fourth step is regularised.",
        default="every step",
        called="regularising each step",
    ),
    Section(
        studies.FIXED,
        "α drawn or fixed",
        "The paper draws a new α for each step. The fixed α is the middle of the interval.",
        default="α drawn from (0, 0.6)",
        called="drawing α in each step",
    ),
)
