"""The texts of the page of the comparison, apart from the tables."""

from __future__ import annotations

from statistics import median

from examples.shapes.comparison_settings import Method, base_and_novel
from examples.shapes.results import Results, origins, wrapped
from examples.shapes.world import TEMPLATES, class_names

HEADING = """\
<!-- Written by `python -m examples.shapes.report.comparison_page`: edit the generator. -->
# Beside ViFi-CLIP and Vita-CLIP"""

INTRODUCTION = (
    "This page compares three ways of making a video model from CLIP, on one protocol in the "
    "[shapes world](shapes.md). Every method starts from the same tiny CLIP, learns from the same "
    "clips for the same number of steps, and is evaluated on the same clips. "
    "[ViFi-CLIP and Vita-CLIP](prompting.md) explains the methods and their use.",
    "The results hold for drawn shapes and a backbone of 0.6 million parameters (without its word "
    "embeddings). They do not show which method is ahead on Kinetics.",
)

SHOTS = (
    "Top-1 accuracy in % on new clips of the seen shapes. The head of a column gives the number of "
    "training clips of each class (shots)."
)

COMMANDS = """\
```bash
python -m examples.shapes.comparison --tune --out comparison-out  # the learning rates
python -m examples.shapes.comparison --out comparison-out         # 3 seeds; continues after a stop
python -m examples.shapes.comparison --time --out comparison-out  # the time of a step
python -m examples.shapes.report.comparison_page comparison-out/results.json
```"""


def over(seeds: int) -> str:
    """Describe the numbers of a table: their statistics and the number of seeds."""
    return "1 seed" if seeds == 1 else f"mean ± standard deviation over {seeds} seeds"


def describe(method: Method) -> str:
    """Return what a method learns."""
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
    """Return the explanation of the table of parameters and times."""
    about, seconds = timing["environment"], median(timing["seconds"]["FINE-TUNE"])
    return wrapped(
        f"The time of a step of 16 clips is relative to FINE-TUNE, whose step takes {seconds:.2f} "
        "s. The methods were measured in turns, with one thread, on this machine: "
        f"{about['machine']} (torch {about['torch']}). If a method trains the text tower or text "
        "prompts, the class names are encoded in each step. Otherwise they are encoded once. "
        "*bridge and prompt* has two numbers of parameters, one for each half of the steps; its "
        "time is the median over both halves."
    )


def rule() -> str:
    """Return the rule that says when a difference is clear."""
    return wrapped(
        "Differences are paired by seed: two methods see the same clips in the same order. A "
        "number is the mean difference over the seeds, in points of accuracy. A difference is "
        "clear if the 95 % confidence interval of its mean (Student's t) does not contain zero; "
        "this needs two seeds or more. The page tests many differences, so a few of them are clear "
        "by chance."
    )


def protocol(results: Results) -> str:
    """Return how the numbers were made, as a list."""
    sizes = results["settings"]["sizes"]
    recipe, clips = sizes["training"], sizes["clips"]
    base, novel = (sorted({name.rsplit(" ", 1)[0] for name in half}) for half in base_and_novel())
    steps = ", ".join(f"{setting['steps']} ({name})" for name, setting in sizes["settings"].items())
    rates = ", ".join(f"{rate:g} ({name})" for name, rate in results["settings"]["rates"].items())
    prompts = results["settings"]["vifi_prompts"]
    items = (
        f"**Clips**: {clips['train']} for training and {clips['test']} in each test list, of 8 "
        "frames. Each seed draws new clips. The seed also draws the shots (the training clips of "
        "each class), and all methods get the same shots. The clips of fewer shots are a subset of "
        "the clips of more shots.",
        f"**Base and novel** classes are halves of the {len(class_names('seen'))} seen classes, by "
        "the rule of ViFi-CLIP's lists: if all classes are equally frequent, the first half in "
        "alphabetical order is novel. Here the rule divides the shapes (base: "
        f"{', '.join(base)}; novel: {', '.join(novel)}), and both halves have all actions. A clip "
        "is classified among the classes of its half.",
        f"**Training**: a step has {recipe['batch_size']} clips. The numbers of steps are {steps}. "
        f"Every method has AdamW, weight decay {recipe['weight_decay']:g} on matrices, 5 % "
        f"warm-up, half a cosine, and a gradient norm of at most {recipe['clip_grad_norm']:g}. "
        f"IWR has C = {recipe['iwr_weight']:g} and α in (0, {recipe['alpha_max']:g}). SWA "
        "averages over the second half of the steps.",
        "**Prompts**: Vita-CLIP has 8 global prompts in each layer and 8 text prompts that all "
        "classes share. (Class-specific text prompts exist for the training classes only, so they "
        "could not be used for unseen classes.) A row that trains only one visual part of "
        "Vita-CLIP uses the text template "
        '"a photo of a {}.". *bridge and prompt* trains as '
        f"ViFi-CLIP for half of the steps, then it learns {prompts['vision_prompts']} vision and "
        f"{prompts['text_prompts']} text prompts in each layer. In the paper the prompts follow a "
        "complete fine-tuning; here all methods have the same number of steps.",
        f"**Pooling and text**: CLIP, FINE-TUNE and Open-VCLIP use the mean of unit features and "
        f"{len(TEMPLATES)} templates. All other methods normalise this mean, and use one template "
        "or learned text prompts. The row *CLIP, pooled as in ViFi-CLIP* is the original CLIP with "
        "the normalised mean and one template.",
        "**λ** weighs CLIP. It is chosen for each method and setting by the best mean accuracy "
        "over seeds on clips of the *development* shapes. No method is trained on these shapes, "
        "and the tables above report no accuracy on them. So the chosen λ suits new shapes. The "
        "closed set and the few-shot tests have trained shapes, for which another λ can be better. "
        "FINE-TUNE and ViFi-CLIP have two rows in the tables above: one row for the last weights, "
        "and one row for the interpolated weights. The methods with IWR and SWA have a row for the "
        "interpolated weights only.",
        f"**Learning rates**: {rates}. The methods are of four kinds, and each kind has one "
        "learning rate for all settings. For example, Open-VCLIP and FINE-TUNE have the same "
        "learning rate. The rate of a kind was chosen with one method of this kind, without "
        "interpolation. The table below shows the accuracies of the rates that were tried.",
        f"**Machines and versions**: {origins(results)}.",
    )
    return "\n".join(wrapped(item, "- ") for item in items)
