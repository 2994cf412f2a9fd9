"""Load a VideoCLIP from a folder or the Hugging Face Hub, save it, upload it, and export it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from openvclip.checkpoints.contract import Contract
from openvclip.models.tokenizers import Tokenizer

if TYPE_CHECKING:
    from openvclip.models.classifier import ZeroShotClassifier
    from openvclip.models.export import WeightKind
    from openvclip.models.exported_parts import Part, PixelKind
    from openvclip.models.folders import StoredModel

Model = TypeVar("Model", bound="HandOver")


class HandOver:
    """The methods of :class:`openvclip.VideoCLIP` that load, save, upload and export it."""

    model: Any
    tokenizer: Tokenizer
    origin: tuple[str, str | None] | None = None
    """The ``source`` and the ``pretrained`` of :meth:`from_pretrained`, or ``None``."""

    @property
    def contract(self) -> Contract:
        """How the model is used."""
        raise NotImplementedError

    def classifier(self, labels: Sequence[str]) -> ZeroShotClassifier:
        """Return the classifier of labels."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls: type[Model],
        source: str | os.PathLike[str],
        pretrained: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | None = None,
    ) -> Model:
        """Load a model with everything that its use on videos needs.

        The model is expanded and used as its contract says. A model without a contract is not
        expanded and has the released settings. If transformers wrote the folder and the image
        processor in it scales images to a square (SigLIP), the frames are scaled to a square too.
        Only safe files are loaded.

        Args:
            source: a folder that :meth:`save_pretrained`, a training run, open_clip or transformers
                wrote; a file of weights in such a folder; ``"hf-hub:user/name"``, a repository on
                the Hugging Face Hub with such files; or the name of a model of open_clip.
            pretrained: with a name of open_clip: a tag of open_clip such as ``"openai"``, or a file
                of weights. Default: ``None``, because the other sources have weights.
            device: the device of the model.
            dtype: the dtype of the weights. Default: float32.
            revision: a branch, a tag or a commit of the repository. Default: the main branch.
            cache_dir: the folder of downloaded files. Default: the cache of huggingface_hub.
            local_files_only: whether to use only files that were downloaded before. Default:
                only if the Hub does not answer, or if ``HF_HUB_OFFLINE`` is set.
            token: a token of the Hub. Default: the stored token, if there is one.

        Raises:
            CheckpointError: there is no such folder; or the folder has no weights, or several files
                of weights and nothing that names one; or a file is damaged.
            UnsafeCheckpointError: a file contains a pickle that could run arbitrary code.
            ContractError: the contract was written by a newer version of openvclip, or it differs
                from the contract in the header of the weights.
            StateMismatchError: the weights do not fit the model of the configuration.
            NonFiniteWeightsError: a weight is NaN or infinite.
            ModelNameError: there is no such model, or it can't be built.
            HubError: the Hub has no such repository or revision, or does not answer.
            UsageError: ``source`` or ``pretrained`` is no path and no name, or this machine does
                not have the ``device``.
        """
        from openvclip.models.folders import load_stored

        stored = load_stored(
            source,
            pretrained,
            device=device,
            dtype=dtype,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        loaded = cls(stored.model, stored.tokenizer, contract=stored.contract)  # type: ignore[call-arg]
        if revision is None:
            loaded.origin = os.fspath(source), None if pretrained is None else os.fspath(pretrained)
        return loaded

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        config: str | Mapping[str, Any] | None = None,
        max_shard_size: int | None = None,
        title: str | None = None,
        **facts: Any,
    ) -> None:
        """Save the model in a folder, with its contract, configuration, tokenizer and model card.

        open_clip loads the folder of a model of open_clip with ``local-dir:FOLDER``. transformers
        loads the folder of a model of transformers with ``from_pretrained``. Both see a plain CLIP.

        The folder is written atomically: if the process is killed, :meth:`from_pretrained` loads
        the old or the new model. Other files in the folder are not changed. A ``README.md`` that
        somebody wrote or changed is kept.

        Args:
            folder: the folder. Missing folders are created.
            config: the open_clip configuration of the model: a dictionary, a JSON file, or a name
                in open_clip. Default: the configuration that the model was loaded with, or the
                configuration of an open_clip model with the same modules, names and shapes.
            max_shard_size: bytes of the weights in a file. Larger models are written in several
                files and an index, which open_clip can't load. Default: one file.
            title: name of the model in the model card. Default: the name of the folder.
            facts: attributes of the contract to change in the folder, such as ``licence="mit"`` or
                ``results={"UCF-101": 0.83}``; see :class:`openvclip.checkpoints.Contract`.

        Raises:
            UsageError: the configuration is not known; or the tokenizer can't be saved; or the
                model has adapters or sharded weights, or weights without values (on the meta
                device); or a fact is unknown; or ``folder`` is no path.
            ClassNamesError: a template is a function.
            CheckpointError: the folder can't be written. An older model in it is unchanged.
        """
        from openvclip.models.saving import SaveOptions, save_stored

        save_stored(self._stored(facts), folder, SaveOptions(config, max_shard_size, title))

    def describe_folder(
        self,
        folder: str | os.PathLike[str],
        weights: str,
        *,
        config: str | Mapping[str, Any] | None = None,
        **facts: Any,
    ) -> None:
        """Write the contract, the configuration and the tokenizer beside files of weights.

        A training run has several files of weights in its folder. Afterwards
        :meth:`from_pretrained` loads the file ``weights`` of the folder. The files are written
        atomically.

        Args:
            folder: the folder of the weights.
            weights: the name of the file of weights to use. It need not exist yet.
            config: see :meth:`save_pretrained`.
            facts: see :meth:`save_pretrained`.

        Raises:
            UsageError, ClassNamesError, CheckpointError: see :meth:`save_pretrained`.
        """
        from openvclip.models.saving import describe_folder

        describe_folder(self._stored(facts), folder, weights, config)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> str:
        """Upload the model to the Hugging Face Hub, in one commit.

        ``VideoCLIP.from_pretrained("hf-hub:user/name")`` loads the model; open_clip and
        transformers load it as well. A model card in the repository that somebody wrote or changed
        is kept.

        Args:
            repo: the repository, such as ``"user/name"``. It is created if it does not exist.
            private: whether a new repository is private. Default: the setting of the user.
            token: a token that may write. Default: the stored token.
            revision: the branch. Default: the main branch.
            commit_message: the message of the commit.
            create_pr: whether to open a pull request.
            options: the options of :meth:`save_pretrained`.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            HubError: there is no token, access is denied, or the Hub does not answer.
            UsageError, ClassNamesError: see :meth:`save_pretrained`.
        """
        from openvclip.models.saving import SaveOptions, push_stored

        names = ("config", "max_shard_size", "title")
        save_options = SaveOptions(**{n: options.pop(n) for n in names if n in options})
        return push_stored(
            self._stored(options),
            repo,
            save_options,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        labels: Sequence[str] | None = None,
        part: Part | None = None,
        pixels: PixelKind = "float",
        weights: WeightKind = "float32",
        opset: int | None = None,
    ) -> Path:
        """Write a part of the model, with its contract, for programs without this package.

        See :func:`openvclip.models.export_model`.

        Args:
            path: the file to write: ``.onnx`` (onnxruntime) or ``.pt2`` (``torch.export``).
            labels: K different labels. Then the file returns their logits.
            part: ``"image"`` (one feature for each clip), ``"frames"``, ``"text"`` or
                ``"labels"``. Default: ``"labels"`` if there are labels, and ``"image"`` otherwise.
            pixels: ``"float"`` for normalised frames, ``"uint8"`` for 8-bit frames of the same
                size.
            weights: ``"float32"``, or ``"int8"`` for 8-bit weights of the linear layers.
            opset: version of the ONNX operators. Default: the version that PyTorch prefers.

        Returns:
            The path of the file.

        Raises:
            UsageError, MissingDependencyError, UnsupportedModelError, CheckpointError: see
                :func:`openvclip.models.export_model`.
            ClassNamesError: ``labels`` is empty, or holds an empty or repeated label.
        """
        from openvclip.models.export import ExportSettings, export_model

        settings = ExportSettings(part, pixels, weights, opset)
        if labels is not None and part in (None, "labels"):
            classifier = self.classifier(labels)
            return export_model(classifier, path, contract=self.contract, settings=settings)
        return export_model(
            self.model,
            path,
            contract=self.contract,
            labels=labels,
            tokenizer=self.tokenizer,
            settings=settings,
        )

    def _stored(self, facts: Mapping[str, Any]) -> StoredModel:
        from openvclip.models.folders import StoredModel, with_facts

        return StoredModel(self.model, self.tokenizer, with_facts(self.contract, facts))
