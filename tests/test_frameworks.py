"""Lightning, Hugging Face accelerate and transformers.Trainer train with fastopt unchanged, also where they clip.

Real packages, where they are installed (pip install lightning accelerate transformers); a small model, one process.
"""

import pytest
import torch
from torch import nn

from . import reference
from .optimizers import ROWS
from .reference import assert_same_bits, snapshot

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4 * count, 6, generator=generator), torch.randn(4 * count, 1, generator=generator)


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


CLIP = 0.05  # what frameworks are told to clip to: less than any norm here


def lightning_run(make, folder, epochs, resume=None, clip=CLIP):
    """Trains with a scheduler and clipping; returns the snapshot at the end, the checkpoint's path, the optimizer."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = small_model()

        def training_step(self, batch, _):
            x, y = batch
            return nn.functional.mse_loss(self.model(x), y)

        def configure_optimizers(self):
            optimizer = make(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batches(3)), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=clip,
        default_root_dir=folder,
    )
    module = Module()
    with reference.correctly_rounded_sqrt():
        trainer.fit(module, data, ckpt_path=resume, weights_only=False)
    path = folder / f"{epochs}.ckpt"
    trainer.save_checkpoint(path)
    return snapshot(trainer.optimizers[0]), path, trainer.optimizers[0]


@every_row
def test_lightning(row, tmp_path):
    pytest.importorskip("lightning")
    folders = [tmp_path / name for name in ("ours", "theirs")]
    makes = [row.make_ours(row.plain), row.make_reference(row.plain)]
    whole = []
    for make, folder in zip(makes, folders, strict=True):
        folder.mkdir()
        whole.append(lightning_run(make, folder, 4)[0])
    assert_same_bits(*whole, row.name)
    for first, then in ((0, 0), (0, 1), (1, 0)):  # also from the other library's checkpoint
        _, path, _ = lightning_run(makes[first], folders[first], 2)
        resumed = lightning_run(makes[then], folders[then], 4, resume=path)[0]
        assert_same_bits(resumed, whole[0], f"{row.name} {first} {then}")


def accelerate_run(make, steps, save_at=None, resume=None, clip=CLIP):
    import accelerate

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = small_model()
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batches(6)), batch_size=4)
    model, wrapped, data, scheduler = accelerator.prepare(model, optimizer, data, scheduler)
    if resume is not None:
        accelerator.load_state(resume)
    done = 0
    while done < steps:
        for x, y in data:
            with accelerator.accumulate(model), reference.correctly_rounded_sqrt():
                accelerator.backward(nn.functional.mse_loss(model(x), y))
                if accelerator.sync_gradients and clip is not None:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                wrapped.step()
                scheduler.step()
                wrapped.zero_grad()
        done += 1
        if save_at is not None:
            accelerator.save_state(save_at)
    return snapshot(optimizer), optimizer


@every_row
def test_accelerate(row, tmp_path):
    pytest.importorskip("accelerate")
    makes = [row.make_ours(row.plain), row.make_reference(row.plain)]
    whole = [accelerate_run(make, 4)[0] for make in makes]
    assert_same_bits(*whole, row.name)
    for first, then in ((0, 0), (0, 1), (1, 0)):
        folder = str(tmp_path / f"{first}{then}")
        accelerate_run(makes[first], 2, save_at=folder)
        assert_same_bits(accelerate_run(makes[then], 2, resume=folder)[0], whole[0], f"{row.name} {first} {then}")


def trainer_run(make, folder, clip=CLIP):
    import transformers

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small_model()

        def forward(self, x, labels):
            y = self.model(x)
            return {"loss": nn.functional.mse_loss(y, labels), "logits": y}

    model = Model()
    optimizer = make(model.parameters())
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        max_grad_norm=0.0 if clip is None else clip,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data = [{"x": x, "labels": y} for x, y in zip(*batches(4), strict=True)]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    with reference.correctly_rounded_sqrt():
        trainer.train()
    return snapshot(optimizer), optimizer


@every_row
def test_trainer(row, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    ours, theirs = (trainer_run(make(row.plain), tmp_path)[0] for make in (row.make_ours, row.make_reference))
    assert_same_bits(ours, theirs, row.name)


FRAMEWORKS = {
    "lightning": lambda make, folder, clip: lightning_run(make, folder, 2, clip=clip),
    "accelerate": lambda make, folder, clip: accelerate_run(make, 2, clip=clip),
    "transformers": trainer_run,
}


@every_row
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_clipping_moved_into_the_step(row, framework, tmp_path):
    """Theirs turned off, and an option of the optimizer, as docs/after-backward.md shows it: the same training."""
    pytest.importorskip(framework)
    run = FRAMEWORKS[framework]
    theirs = run(row.make_ours(row.plain), tmp_path, CLIP)[0]
    ours, *_, optimizer = run(lambda params: row.ours(params, **row.plain, max_grad_norm=CLIP), tmp_path, None)
    assert optimizer.grad_norm > CLIP
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
