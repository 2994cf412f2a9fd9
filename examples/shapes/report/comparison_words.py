"""What the page of the comparison says beside its tables."""

from __future__ import annotations

from statistics import median

from examples.shapes.comparison_settings import Method, base_and_novel
from examples.shapes.results import Results, origins, wrapped
from examples.shapes.world import TEMPLATES, class_names

HEADING = """\
<!-- written by python -m examples.shapes.report.comparison_page; edit that, not this -->
# Beside ViFi-CLIP and Vita-CLIP"""

INTRODUCTION = (
    "The three ways of making a video model of CLIP on one protocol, in the "
    "[shapes world](shapes.md): every method starts from the same tiny CLIP, learns from the same "
    "clips for the same number of steps, and is tried on the same clips. What the methods are and "
    "how to use them is in [ViFi-CLIP and Vita-CLIP](prompting.md).",
    "A world of drawn shapes says how the methods behave at this size, with a backbone of 0.6 "
    "million parameters (without its word embeddings). It does not say who is ahead on Kinetics.",
)

SHOTS = (
    "Top-1 accuracy in % on new clips of the seen shapes, by the number of clips of each class"
    " that were learned from."
)

COMMANDS = """\
```bash
python -m examples.shapes.comparison --tune --out comparison-out  # the learning rates
python -m examples.shapes.comparison --out comparison-out         # 3 seeds, goes on if stopped
python -m examples.shapes.comparison --time --out comparison-out  # the time of a step
python -m examples.shapes.report.comparison_page comparison-out/results.json
```"""


def over(seeds: int) -> str:
    """What the numbers of a table are."""
    return "1 seed" if seeds == 1 else f"mean ± standard deviation over {seeds} seeds"


def describe(method: Method) -> str:
    """What a method learns."""
    if method.family is None:
        return "nothing"
    if method.bridged:
        return "both towers for half of the steps, then prompts in both"
    if method.vita is not None:
        names = [part.replace("_", " ") for part, value in method.vita.items() if value]
        return "all prompts" if len(names) == len(method.vita) else names[0]
    towers = {"both": "both towers", "image": "image tower", "text": "text tower"}
    attention = ", attention over 3 frames" if method.expanded else ""
    return towers[method.train or "both"] + attention + ("; IWR, SWA" if method.regularised else "")


def about_times(timing: Results) -> str:
    """What the table of parameters and times means."""
    about, seconds = timing["environment"], median(timing["seconds"]["FINE-TUNE"])
    return wrapped(
        f"The time of a step of 16 clips is over that of FINE-TUNE, {seconds:.2f} s, measured in "
        f"turns with one thread on this machine: {about['machine']} (torch {about['torch']}). "
        "Class names are encoded once where nothing of the text learns, else in each step. "
        "*bridge and prompt* has two numbers of parameters, one for each half; its time is the "
        "median over both."
    )


def rule() -> str:
    """When a difference is clear."""
    return wrapped(
        "Differences are paired by seed: two methods see the same clips in the same order. Numbers "
        "are points of accuracy, means over the seeds. A difference is called clear where the 95 % "
        "confidence interval of its mean (Student's t) leaves out zero, with two seeds or more; of "
        "many differences a few will be called clear by chance."
    )


def protocol(results: Results) -> str:
    """How the numbers were made, as a list."""
    sizes = results["settings"]["sizes"]
    recipe, clips = sizes["training"], sizes["clips"]
    base, novel = (sorted({name.rsplit(" ", 1)[0] for name in half}) for half in base_and_novel())
    steps = ", ".join(f"{one['steps']} ({name})" for name, one in sizes["settings"].items())
    rates = ", ".join(f"{rate:g} ({name})" for name, rate in results["settings"]["rates"].items())
    prompts = results["settings"]["vifi_prompts"]
    items = (
        f"**Clips**: {clips['train']} for training and {clips['test']} in each test list, drawn "
        "anew for each seed; 8 frames. The shots are drawn by the seed, fewer a part of more, the "
        "same for all methods.",
        f"**Base and novel** classes are halves of the {len(class_names('seen'))} seen ones by the "
        "rule of ViFi-CLIP's lists, by which the first half in alphabetical order is novel where "
        "all classes are equally frequent. Here that divides the shapes (base: "
        f"{', '.join(base)}; novel: {', '.join(novel)}), and both halves have all actions. Each "
        "half is told apart among its own classes.",
        f"**Training**: steps of {recipe['batch_size']} clips: {steps}. AdamW, weight decay "
        f"{recipe['weight_decay']:g} on matrices, 5 % warm-up and half a cosine, gradients' norm "
        f"at most {recipe['clip_grad_norm']:g}, for every method. IWR has C = "
        f"{recipe['iwr_weight']:g} and α in (0, {recipe['alpha_max']:g}); SWA averages over the "
        "second half of the steps.",
        "**Prompts**: Vita-CLIP has 8 global prompts a layer and 8 text prompts that all classes "
        "share (class-specific ones could not serve unseen classes); visual parts that stand alone "
        'go with the text "a photo of a ...". *bridge and prompt* learns '
        f"{prompts['vision_prompts']} vision and {prompts['text_prompts']} text prompts in each "
        "layer, after half of the steps as ViFi-CLIP: in the paper it comes on top of a fine-tune, "
        "here all methods have the same number of steps.",
        f"**Pooling and text**: CLIP, FINE-TUNE and Open-VCLIP take the mean of unit features and "
        f"{len(TEMPLATES)} templates; the others normalise the mean and have one template, or text "
        "prompts that are learned. *CLIP, pooled as in ViFi-CLIP* is where those with the template "
        "start from.",
        "**λ** weighs CLIP and is chosen for each method and setting by the best mean accuracy "
        "over seeds on clips of the *development* shapes, on which no method is trained or "
        "reported. That favours what carries over to new shapes, in the closed set and with few "
        "shots too. FINE-TUNE and ViFi-CLIP stand in the tables as they end and interpolated, "
        "methods with IWR and SWA interpolated alone.",
        f"**Learning rates**: {rates}. Each was chosen as the table below says, for one method "
        "without interpolation, and is used for all methods of its kind in all settings: "
        "Open-VCLIP has that of FINE-TUNE.",
        f"**Made with**: {origins(results)}.",
    )
    return "\n".join(wrapped(item, "- ") for item in items)
