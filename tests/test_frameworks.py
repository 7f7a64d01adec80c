"""Lightning and Hugging Face accelerate train with fastopt unchanged, and resume from their checkpoints.

Real packages, where they are installed (pip install lightning accelerate), on a small model and one process.
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


def lightning_run(make, folder, epochs, resume=None):
    """Trains with a scheduler and clipping; returns the snapshot at the end and the path of the checkpoint."""
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
        gradient_clip_val=0.5,
        default_root_dir=folder,
    )
    module = Module()
    with reference.correctly_rounded_sqrt():
        trainer.fit(module, data, ckpt_path=resume, weights_only=False)
    path = folder / f"{epochs}.ckpt"
    trainer.save_checkpoint(path)
    return snapshot(trainer.optimizers[0]), path


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
        _, path = lightning_run(makes[first], folders[first], 2)
        resumed, _ = lightning_run(makes[then], folders[then], 4, resume=path)
        assert_same_bits(resumed, whole[0], f"{row.name} {first} {then}")


def accelerate_run(make, steps, save_at=None, resume=None):
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
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                wrapped.step()
                scheduler.step()
                wrapped.zero_grad()
        done += 1
        if save_at is not None:
            accelerator.save_state(save_at)
    return snapshot(optimizer)


@every_row
def test_accelerate(row, tmp_path):
    pytest.importorskip("accelerate")
    makes = [row.make_ours(row.plain), row.make_reference(row.plain)]
    whole = [accelerate_run(make, 4) for make in makes]
    assert_same_bits(*whole, row.name)
    for first, then in ((0, 0), (0, 1), (1, 0)):
        folder = str(tmp_path / f"{first}{then}")
        accelerate_run(makes[first], 2, save_at=folder)
        assert_same_bits(accelerate_run(makes[then], 2, resume=folder), whole[0], f"{row.name} {first} {then}")
