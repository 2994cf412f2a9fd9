"""The trainer of transformers does the steps of Equation 9 and of the averages, also resumed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openvclip import EMATracker, InterpolatedWeightRegularizer, SWATracker
from openvclip.errors import CheckpointError, UsageError
from openvclip.integrations.transformers import STATE_FILE, RegularizedTrainerMixin
from tests.forked import free_port, rendezvous, started
from tests.helpers import assert_same_state, snapshot

transformers = pytest.importorskip("transformers")

Weights = dict[str, Tensor]
LR, STEPS = 1e-2, 6


class Trainer(RegularizedTrainerMixin, transformers.Trainer):
    """The trainer of the documentation."""


class OwnLoss(Trainer):
    """A trainer with a loss of its own, as users write it."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        return loss_of(model, inputs)


def tiny_clip() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.CLIPConfig(
        text_config={**sizes, "num_attention_heads": 2, "vocab_size": 20,
                     "eos_token_id": 19, "bos_token_id": 0, "max_position_embeddings": 6},
        vision_config={**sizes, "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )  # fmt: skip
    model: nn.Module = transformers.CLIPModel(config).double()
    return model


def examples(number: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 19, (number, 6), generator=generator)
    tokens[:, -1] = 19
    pixels = torch.randn(number, 3, 8, 8, generator=generator, dtype=torch.float64)
    return [{"input_ids": t, "pixel_values": p} for t, p in zip(tokens, pixels, strict=True)]


def collate(batch: list[dict[str, Tensor]]) -> dict[str, Any]:
    joined = {name: torch.stack([item[name] for item in batch]) for name in batch[0]}
    return {**joined, "return_loss": True}


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def arguments(out: Path, **options: Any) -> Any:
    defaults = {
        "per_device_train_batch_size": 2, "max_steps": STEPS, "learning_rate": LR,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.5, "optim": "adamw_torch",
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "logging_steps": 1, "train_sampling_strategy": "sequential", "weight_decay": 0.0,
    }  # fmt: skip
    return transformers.TrainingArguments(str(out), **{**defaults, **options})


def trainer_of(
    out: Path, cls: type[Trainer] = Trainer, iwr: dict[str, Any] | None = None, **options: Any
) -> Trainer:
    model = tiny_clip()
    regularizer = InterpolatedWeightRegularizer(model, anchor=snapshot(model), **(iwr or {}))
    return cls(
        model=model,
        args=arguments(out, **options),
        train_dataset=examples(),
        data_collator=collate,
        regularizer=regularizer,
        averages=[SWATracker(model), EMATracker(model, decay=0.5)],
    )


def by_hand(
    accumulate: int = 1, size: int = 2, every: int = 1, share: float = 1.0
) -> tuple[Weights, Weights]:
    """Two models, one of them interpolated, and one plain loop; no regulariser and no trainer."""
    model, second, clip = tiny_clip(), tiny_clip(), snapshot(tiny_clip())
    probe = InterpolatedWeightRegularizer(tiny_clip(), share=share)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    data = examples()
    batches = [collate(data[i : i + size]) for i in range(0, len(data), size)] * 10
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(STEPS):
        optimizer.zero_grad()
        second.zero_grad()
        regularized = step % every == 0
        if regularized:
            with probe.interpolated() as alpha:
                pass
            now = snapshot(model)
            second.load_state_dict({n: alpha * clip[n] + (1 - alpha) * now[n] for n in clip})
        for batch in batches[accumulate * step : accumulate * (step + 1)]:
            (loss_of(model, batch) / accumulate).backward()
            if regularized:
                (part,) = probe.part_of(batch)
                (0.5 * loss_of(second, part) / accumulate).backward()
        for parameter, other in zip(model.parameters(), second.parameters(), strict=True):
            if other.grad is not None:
                parameter.grad = parameter.grad + other.grad
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        for name, parameter in model.named_parameters():
            total[name] += parameter.detach()
    return snapshot(model), {name: value / STEPS for name, value in total.items()}


def assert_close(actual: Weights, expected: Weights) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("cls", [Trainer, OwnLoss])
@pytest.mark.parametrize(("accumulate", "every"), [(1, 1), (2, 1), (1, 2)])
def test_training_equals_a_loop_by_hand(
    tmp_path: Path, cls: type[Trainer], accumulate: int, every: int
) -> None:
    options = {"gradient_accumulation_steps": accumulate}
    trainer = trainer_of(tmp_path, cls, {"every": every}, **options)
    trainer.train()
    weights, mean = by_hand(accumulate, every=every)
    assert_close(snapshot(trainer.model), weights)
    swa = trainer.averages[0]
    assert swa.n_averaged == STEPS
    assert_close(swa.averaged_state_dict(), mean)


def test_training_on_a_part_of_the_inputs_equals_a_loop_by_hand(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, iwr={"share": 0.5}, per_device_train_batch_size=4)
    trainer.train()
    assert_close(snapshot(trainer.model), by_hand(size=4, share=0.5)[0])


class Sums(nn.Module):
    """A model whose loss is a sum over the items, divided by the number that the trainer gives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2).double()

    def forward(
        self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        total = nn.functional.cross_entropy(self.layer(x), labels, reduction="sum")
        return {"loss": total / (len(x) if num_items_in_batch is None else num_items_in_batch)}


class Means(Sums):
    """The same model, whose signature does not ask for the number of items."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return super().forward(x, labels)


def test_the_number_of_items_that_a_sum_is_divided_by_is_that_of_the_part(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [
        {"x": torch.randn(3, generator=generator, dtype=torch.float64), "labels": n % 2}
        for n in range(8)
    ]
    states = []
    for cls in (Sums, Means):
        model = cls()
        iwr = InterpolatedWeightRegularizer(model, share=0.25, weight=2.0)
        args = arguments(
            tmp_path, max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2
        )
        Trainer(model=model, args=args, train_dataset=data, regularizer=iwr).train()
        states.append(snapshot(model))
    assert not torch.equal(states[0]["layer.weight"], snapshot(Sums())["layer.weight"])
    assert_close(*states)


def test_the_logged_loss_is_that_of_the_weights_themselves(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=1)
    expected = float(loss_of(tiny_clip(), collate(examples()[:2])).detach())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_without_regularizer_and_averages_it_is_the_plain_trainer(tmp_path: Path) -> None:
    states = []
    for cls in (Trainer, transformers.Trainer):
        model = tiny_clip()
        args = arguments(tmp_path / cls.__name__, save_strategy="steps", save_steps=STEPS)
        cls(model=model, args=args, train_dataset=examples(), data_collator=collate).train()
        states.append(snapshot(model))
        assert not list(tmp_path.rglob(STATE_FILE))
    assert_same_state(*states)


def test_a_second_run_draws_its_own_alphas_and_skipped_steps_are_not_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tmp_path, max_steps=1)
    assert trainer.regularizer is not None
    interpolated, known = trainer.regularizer.interpolated, list[Any]()

    def recorded(alpha: float | None = None) -> Any:
        known.append(alpha)
        return interpolated(alpha)

    monkeypatch.setattr(trainer.regularizer, "interpolated", recorded)
    trainer.train()
    skipped = property(lambda accelerator: True)
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", skipped)
    trainer.train()
    assert known == [None, None]
    assert [average.n_averaged for average in trainer.averages] == [1, 1]


@pytest.mark.parametrize("named", [True, False])
def test_a_resumed_run_equals_a_run_that_was_never_stopped(tmp_path: Path, named: bool) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(tmp_path / "whole", **saving)
    whole.train()
    resumed = trainer_of(tmp_path / "whole", **saving)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    if not named:  # the last checkpoint of the folder
        (tmp_path / "whole" / "checkpoint-6").rename(tmp_path / "later")
    resumed.train(resume_from_checkpoint=str(checkpoint) if named else True)
    assert_same_state(snapshot(resumed.model), snapshot(whole.model))
    for average, expected in zip(resumed.averages, whole.averages, strict=True):
        assert average.n_averaged == STEPS
        assert_same_state(average.averaged_state_dict(), expected.averaged_state_dict())


def test_a_checkpoint_without_the_states_is_refused(tmp_path: Path) -> None:
    trainer_of(tmp_path, save_strategy="steps", save_steps=3).train()
    path = tmp_path / "checkpoint-3" / STATE_FILE
    fewer = trainer_of(tmp_path)
    fewer.averages = ()
    with pytest.raises(CheckpointError, match="2 averages; the trainer has a regulariser and 0"):
        fewer.train(resume_from_checkpoint=str(path.parent))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"openvclip\.pt can't be read.*older checkpoint"):
        trainer_of(tmp_path).train(resume_from_checkpoint=str(path.parent))
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file, so the regulariser"):
        trainer_of(tmp_path).train(resume_from_checkpoint=str(path.parent))


class Recorded(nn.Linear):
    """A layer with extra state in a buffer of bytes, as Transformer Engine has it."""

    def get_extra_state(self) -> Any:
        return io.BytesIO(b"record")

    def set_extra_state(self, state: Any) -> None:
        assert state.getvalue() == b"record"


def test_an_average_with_extra_state_in_a_buffer_resumes(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    layer = Recorded(2, 2)
    saved, resumed = SWATracker(layer), SWATracker(layer)
    saved.update(layer)
    trainer.averages = (saved,)
    trainer._save_states(tmp_path / STATE_FILE)
    trainer.averages = (resumed,)
    trainer._load_states(tmp_path / STATE_FILE)
    assert resumed.averaged_state_dict()["_extra_state"].getvalue() == b"record"


def test_a_trainer_with_a_backward_pass_of_its_own_is_refused(tmp_path: Path) -> None:
    class Base(transformers.Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            loss = loss_of(model, inputs)
            loss.backward()
            return loss.detach()

    class Wrong(RegularizedTrainerMixin, Base):
        pass

    trainer = trainer_of(tmp_path, Wrong)
    before = snapshot(trainer.model)
    with pytest.raises(UsageError, match=r"called accelerator\.backward\(\) 0 times"):
        trainer.train()
    assert_same_state(snapshot(trainer.model), before)


def two_processes(out: str) -> None:
    """Train on the same examples as one process with batches of twice the size."""
    folder = Path(out)
    trainer = trainer_of(folder, OwnLoss, per_device_train_batch_size=2, ddp_backend="gloo")
    trainer.train()
    if trainer.args.process_index == 0:
        torch.save([snapshot(trainer.model), trainer.averages[0].averaged_state_dict()],
                   folder / "weights.pt")  # fmt: skip
    torch.distributed.barrier()
    (folder / f"{trainer.args.process_index}.json").write_text(json.dumps("done"))


def test_two_processes_train_on_the_mean_of_their_losses(tmp_path: Path) -> None:
    port = free_port()
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    with (
        started(two_processes, str(tmp_path), log=logs[0], **rendezvous(0, 2, port)) as first,
        started(two_processes, str(tmp_path), log=logs[1], **rendezvous(1, 2, port)) as second,
    ):
        for process in (first, second):
            process.join(120)
    assert (tmp_path / "1.json").is_file(), logs[1].read_text() + logs[0].read_text()
    weights, mean = torch.load(tmp_path / "weights.pt")
    # Each process has two of the four examples of a step, as two micro-batches of one process have.
    expected, expected_mean = by_hand(accumulate=2)
    assert_close(weights, expected)
    assert_close(mean, expected_mean)


def test_a_regulariser_of_another_model_is_an_error(tmp_path: Path) -> None:
    """The run would not be regularised, and nothing else would say so."""
    trainer = trainer_of(tmp_path)
    trainer.regularizer = InterpolatedWeightRegularizer(tiny_clip())
    before = snapshot(trainer.model)
    with pytest.raises(UsageError, match="none of the trained parameters of the model that is reg"):
        trainer.train()
    assert_same_state(snapshot(trainer.model), before)


def test_an_optimizer_that_evaluates_the_loss_several_times_is_an_error(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.optimizer = torch.optim.LBFGS(trainer.model.parameters())
    with pytest.raises(UsageError, match="LBFGS"):
        trainer.train()
