"""Run the video tasks of mteb on a model: retrieval, classification, clustering and others.

    python mteb_video.py runs/b16 MSRVTTT2V MSRVTTV2T      # prints the main score of each task
    python mteb_video.py hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K MSRVTTT2V --frames 12

The model is a folder or a name that ``openvclip.VideoCLIP.from_pretrained`` takes. mteb downloads
the data of a task. The frames of a video are one for each second, as in docs/retrieval.md; the
scores of mteb are other metrics (such as ndcg@10) on its own copies of the data sets.
Install: ``pip install "openvclip[video]" mteb torchcodec``.
"""

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

import openvclip


class VideoEncoder:
    """A VideoCLIP as an encoder of mteb: of texts, images and videos.

    An input of several kinds, such as a video with a text, has the sum of their features.

    Args:
        model: the model.
        name: the name in the results of mteb, such as ``"me/my-model"``.
    """

    def __init__(self, model: openvclip.VideoCLIP, name: str) -> None:
        self.model, self.name = model, name

    def encode(self, inputs: Iterable[Mapping[str, Any]], **_: Any) -> np.ndarray:
        """Return features of unit length ``[n, D]``, for batches of inputs."""
        rows = [self._batch(batch) for batch in inputs]
        return torch.cat(rows).numpy()

    def _batch(self, batch: Mapping[str, Any]) -> torch.Tensor:
        parts = []
        if "video" in batch:
            parts.append(self.model.encode_video([source(v) for v in batch["video"]]))
        if "image" in batch:
            parts.append(self.model.encode_image(list(batch["image"])))
        if "text" in batch:
            parts.append(self.model.encode_text(list(batch["text"])))
        if not parts:
            raise ValueError(f"inputs with {list(batch)}; expected video, image or text")
        return torch.nn.functional.normalize(torch.stack(parts).sum(dim=0), dim=-1)

    def similarity(self, first: Any, second: Any) -> torch.Tensor:
        """Return the cosines ``[n, m]`` of features."""
        return torch.as_tensor(first) @ torch.as_tensor(second).T

    def similarity_pairwise(self, first: Any, second: Any) -> torch.Tensor:
        """Return the cosine ``[n]`` of each pair of features."""
        return (torch.as_tensor(first) * torch.as_tensor(second)).sum(dim=-1)

    @property
    def mteb_model_meta(self) -> Any:
        """The description of the model in the results."""
        from mteb.models.model_meta import ModelMeta

        facts = {"name": self.name, "revision": "none", "modalities": ["text", "image", "video"]}
        return ModelMeta.create_empty(overwrites=facts)


def source(video: Any) -> Any:
    """Return a video as openvclip reads it: a decoder of torchcodec, bytes or a path."""
    if isinstance(video, Mapping):  # a column of the library datasets with decode=False
        return video["bytes"] if video.get("bytes") else video["path"]
    return video


def main(arguments: list[str] | None = None) -> None:
    """Run the tasks and print their main scores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder of a model, or hf-hub:NAME")
    parser.add_argument("tasks", nargs="+", help="names of tasks of mteb, such as MSRVTTT2V")
    parser.add_argument(
        "--frames", type=int, default=12, help="largest number of frames (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args(arguments)
    import mteb

    model = openvclip.VideoCLIP.from_pretrained(args.model)
    model.sampling = openvclip.video.Sampling(num_frames=args.frames, sampler="seconds")
    name = args.model.removeprefix("hf-hub:").strip("./").replace("/", "__")
    encoder = VideoEncoder(model, f"openvclip/{name}")
    result = mteb.evaluate(
        encoder, mteb.get_tasks(tasks=args.tasks), encode_kwargs={"batch_size": args.batch_size}
    )
    for task in result.task_results:
        print(f"{task.task_name}: {task.get_score():.4f}")


if __name__ == "__main__":
    main()
