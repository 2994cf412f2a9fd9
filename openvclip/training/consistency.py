"""Which options of ``examples/finetune.py`` go together, and which have no effect."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from openvclip.commands.parsing import unused_option
from openvclip.processes import started_processes
from openvclip.training.methods import is_expanded
from openvclip.training.recipe import PROMPT_METHODS, VIFI_TOWERS, Recipe
from openvclip.training.shared_options import unused_frame_options, unused_weight_options
from openvclip.weights.batch_part import part_size

_PROMPT_OPTIONS = ("vision_prompts", "text_prompts", "vision_depth", "text_depth", "class_prompts")


def require_consistent(args: argparse.Namespace, fail: Callable[[str], object]) -> None:
    """Call ``fail`` with a text if options contradict each other or an option is missing."""
    if (args.annotations is None) == (args.shards is None):
        fail("give --annotations (with --videos), or --shards")
    if args.annotations is not None and args.videos is None:
        fail("--annotations needs --videos, the folder of the videos")
    if args.objective == "contrastive":
        _require_pairs(args, fail)
    elif args.shards is not None and args.classes is None:
        fail("--shards needs --classes, a file with a class name on each line")
    if args.val_annotations is not None and args.val_videos is None and args.videos is None:
        fail("--val-annotations needs --val-videos, the folder of the validation videos")
    if args.method == "bridge" and args.start_from is None:
        fail("--method bridge needs --start-from, a file of fine-tuned weights")
    _require_features(args, fail)
    if args.method in PROMPT_METHODS and args.fsdp:
        fail(
            f"--fsdp can't be used with --method {args.method}, which trains only prompts: "
            "leave --fsdp out"
        )
    problem = unused_option(args.given, _unused(args))
    if problem:
        fail(problem)
    if args.num_workers < 0:
        fail(f"--num-workers {args.num_workers}: expected at least 0")


def _require_features(args: argparse.Namespace, fail: Callable[[str], object]) -> None:
    """Check the regularisers that compare features with those of the original CLIP."""
    for name in ("distill", "text_energy"):
        flag, weight = "--" + name.replace("_", "-"), getattr(args, name)
        if not 0 <= weight < math.inf:
            fail(f"{flag} {weight:g}: expected a number of at least 0")
        reason = "--fsdp" if args.fsdp else ""
        if args.objective == "contrastive":
            reason = "--objective contrastive"
        if args.method in PROMPT_METHODS:
            reason = f"--method {args.method}"
        if weight and reason:
            fail(f"{flag} {weight:g} can't be used with {reason}: leave one of the two out")


def _require_pairs(args: argparse.Namespace, fail: Callable[[str], object]) -> None:
    if args.shards is not None:
        fail(
            "--objective contrastive reads captions and not --shards, which hold classes: give "
            "--annotations, a file of captions, and --videos"
        )
    if args.method in PROMPT_METHODS:
        fail(
            f"--method {args.method} learns prompts for class names, which captions don't have: "
            "use another method with --objective contrastive"
        )
    if args.batch_size < 2:
        fail(
            f"--batch-size {args.batch_size}: --objective contrastive compares the videos of a "
            "batch and needs at least 2"
        )
    # Each process takes a part of its own videos, and the parts of all processes are compared.
    if started_processes().world_size == 1 and part_size(args.share, args.batch_size) < 2:
        fail(
            f"--share {args.share:g} of --batch-size {args.batch_size} is one video: --objective "
            "contrastive compares the videos of this part and needs at least 2. Give a larger "
            "--share, or --every in its place"
        )


def _unused(args: argparse.Namespace) -> dict[str, str]:
    """Return why options have no effect with the other options."""
    recipe, method = Recipe(method=args.method), f"with --method {args.method}"
    in_place = "with --hf, which replaces it" if args.hf else ""
    reasons = {"model": in_place, **unused_weight_options(args), **unused_frame_options(args)}
    reasons["pretrained"] = in_place or reasons["pretrained"]
    if args.shards is None:
        reasons["shard_index"] = "without --shards"
    elif args.val_annotations is None or args.val_videos is not None:
        reasons["videos"] = "with --shards, which hold the videos"
    if args.val_annotations is None:
        reasons["val_videos"] = "without --val-annotations"
    if args.steps is not None and "steps" in args.given:
        reasons["epochs"] = "with --steps"
    if args.warmup_epochs == 0:
        reasons["warmup_start_lr"] = "without a warm-up"
    unused: list[str] = []
    if not recipe.uses_iwr:
        unused += ["alpha_max", "alpha_min", "iwr_weight", "every", "share"]
    if not recipe.uses_swa:
        unused += ["average_after", "averages_per_epoch"]
    if args.method != "l2":
        unused += ["l2_weight"]
    if args.method in PROMPT_METHODS:
        unused += ["lam"]
        unused += ["class_prompts"] if args.method == "bridge" else ["vision_depth", "text_depth"]
    else:
        unused += [*_PROMPT_OPTIONS]
    if not is_expanded(args.method):
        unused += ["frame_by_frame", "text_tower"]
    if VIFI_TOWERS.get(args.method) == "text":
        unused += ["text_energy"]  # the features of frames stay those of the original CLIP
    reasons |= dict.fromkeys(unused, method)
    if args.objective == "contrastive":
        captions = "with --objective contrastive, which takes captions as they are"
        reasons |= dict.fromkeys(("classes", "zero_shot_classes", "template"), captions)
    else:
        reasons |= dict.fromkeys(("train_list", "val_list"), "without --objective contrastive")
    if args.val_annotations is None:
        reasons["val_list"] = "without --val-annotations"
    return reasons
