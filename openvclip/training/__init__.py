"""Parts of a training run: batches, shards, checkpoints, processes, log, validation, model card.

``examples/finetune.py`` shows how the parts work together. The module
:mod:`openvclip.training.shards` is also a command, which writes the index of WebDataset shards.
"""

from openvclip.training.batches import Batching, VideoBatches, class_warnings, steps_of_run
from openvclip.training.checkpoints import Checkpoints, TrainingState
from openvclip.training.distillation import FeatureDistillation
from openvclip.training.log import LoaderWatch, RunLog, Step
from openvclip.training.methods import (
    add_distance_penalty,
    attach_prompts,
    choose_trained,
    make_classifier,
    make_distance_penalty,
    make_optimizer,
    make_tracker,
)
from openvclip.training.model_card import ModelCard
from openvclip.training.objectives import make_objective
from openvclip.training.original import OriginalCLIP
from openvclip.training.pairs import PairEncoder, contrastive_loss
from openvclip.training.presets import PRESETS, Preset
from openvclip.training.processes import training_processes, wrap
from openvclip.training.recipe import METHODS, Recipe, Run, learning_rate, total_steps
from openvclip.training.text_energy import TextEnergy
from openvclip.training.validation import SharedAccuracy, SharedRetrieval, Validation

__all__ = [
    "METHODS",
    "PRESETS",
    "Batching",
    "Checkpoints",
    "FeatureDistillation",
    "LoaderWatch",
    "ModelCard",
    "OriginalCLIP",
    "PairEncoder",
    "Preset",
    "Recipe",
    "Run",
    "RunLog",
    "SharedAccuracy",
    "SharedRetrieval",
    "Step",
    "TextEnergy",
    "TrainingState",
    "Validation",
    "VideoBatches",
    "add_distance_penalty",
    "attach_prompts",
    "choose_trained",
    "class_warnings",
    "contrastive_loss",
    "learning_rate",
    "make_classifier",
    "make_distance_penalty",
    "make_objective",
    "make_optimizer",
    "make_tracker",
    "steps_of_run",
    "total_steps",
    "training_processes",
    "wrap",
]
