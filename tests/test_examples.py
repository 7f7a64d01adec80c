"""The demo and the examples, run as a reader runs them (in quick mode): the numbers they print, and their pictures."""

import gzip
import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import fastopt

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "common.py")


@pytest.fixture
def script(tmp_path):
    """Runs an example with this fastopt in an empty working directory; gives what it printed."""

    def run(name):
        path = os.pathsep.join([str(Path(fastopt.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run([sys.executable, str(EXAMPLES / name), "--quick"], cwd=tmp_path, capture_output=True,
                              text=True, timeout=300, env={**os.environ, "PYTHONPATH": path})
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr, done.stderr
        return done.stdout

    return run


@pytest.fixture
def functions(monkeypatch):
    """Imports an example without running it; gives its functions by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return lambda name: types.SimpleNamespace(**runpy.run_path(str(EXAMPLES / name)))


@pytest.fixture
def colours(functions):
    return functions("common.py")


def numbers(line):
    """The numbers of a printed line; words between them do not matter."""
    return [float(number) for number in re.findall(r"(?<![\w.])-?\d[\d,]*\.?\d*(?:e[-+]?\d+)?", line.replace(",", ""))]


def assert_drawn(picture, *colours, least=100):
    """The picture is as wide as a page and has lines (100 pixels) or bars (more) in each of the colours."""
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=int)
    assert pixels.shape[1] >= 700
    for colour in colours:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        near = (np.abs(pixels - wanted).max(-1) <= 8).sum()
        assert near >= least, f"{near} pixels of {colour} in {picture.name}"


def test_readme_names_every_script():
    readme = (EXAMPLES / "README.md").read_text()
    assert sorted(re.findall(r"`python examples/(\w+\.py)`", readme)) == SCRIPTS


def test_demo(script, tmp_path, colours):
    text = script("demo.py")
    rows = re.findall(r"^(?:digits|exp\(-x\) sin\(5x\)) +(\w+) +(\d\.\d+e.*)$", text, re.MULTILINE)
    rows = [row for row in rows if "epoch" not in row[1]]
    assert [name for name, _ in rows] == ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW"] * 2
    for place, (name, row) in enumerate(rows):
        cells = row.split()
        torch_loss, fast_loss = float(cells[0]), float(cells[1])
        assert fast_loss == pytest.approx(torch_loss, rel=1e-3)
        if place < 5:  # digits: two epochs of training beat guessing by far
            assert float(cells[3].rstrip("%")) > 30
            assert cells[2] == cells[3]
            del cells[2:4]
        difference, exact, default, fused, ours, against_default = cells[2:8]
        assert float(difference) < 1e-4
        assert exact == "0.0e+00", "the same bits as torch's formula with a correctly rounded square root"
        assert (fused == "-") == (name == "RMSprop")
        assert float(against_default) == pytest.approx(float(default) / float(ours), abs=0.1, rel=0.1)
    assert "steps that fastopt left to torch.optim: none" in text
    picture = tmp_path / "out" / "demo.png"
    assert "picture: out/demo.png" in text.replace(os.sep, "/")
    optimizers = [colours.COLOURS[name] for name in ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW")]
    bars = colours.TORCH, colours.TORCH_FUSED, colours.FASTOPT  # how high they are is a matter of speed
    assert_drawn(picture, *bars, *optimizers, least=500)


def test_scalars(script, functions, tmp_path, colours):
    text = script("01_scalars.py")
    assert text.count("square roots, bit for bit: yes") == 3
    distances = re.findall(r"torch.optim as it is on this machine: (\S+)", text)
    assert len(distances) == 3 and all(float(distance) < 1e-4 for distance in distances)
    tables = [np.array([numbers(line) for line in part.splitlines() if re.match(r" +\d", line)])
              for part in text.split("loss = ")[1:]]
    square, both, detached = tables
    assert square[:2, 1].tolist() == [10, 9] and (np.diff(square[1:, 1]) > -1).all()
    assert both[:, 1].tolist() == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert np.allclose(both[:, 2], both[:, 1] - 2, atol=2e-7)
    assert (detached[:, 1] == 10).all() and (detached[:, 2] == both[:, 2]).all()
    assert_drawn(tmp_path / "out" / "01_scalars.png", colours.COLOURS["Adam"], colours.COLOURS["SGD"])

    example = functions("01_scalars.py")
    loss_of, start, _ = example.EXPERIMENTS["|x + y|"]
    assert [x for x, _ in example.trajectory(loss_of, start, 9)] == [10 - step for step in range(10)]


def test_regression(script, tmp_path, colours):
    text = script("02_regression.py")
    for activation in ("tanh", "relu"):
        first, last, steps = numbers(re.search(f"{activation} network: .*", text)[0])
        assert steps == 300 and last < first / 5
    for name in ("torch.optim", "torch fused", "fastopt"):
        weight, bias, seconds, in_step, us = numbers(re.search(rf"^ +{name} (.*)", text, re.MULTILINE)[1])
        assert abs(weight - 3) < 1e-4 and abs(bias - 0.8) < 1e-4
        assert 0 < in_step < seconds
        assert us == pytest.approx(in_step / 2000 * 1e6, abs=0.6)
    assert text.count("the same bits all the way: yes") == 2
    assert_drawn(tmp_path / "out" / "02_regression.png", colours.TORCH, colours.TORCH_FUSED, colours.FASTOPT)


def test_classification(script, tmp_path, colours):
    text = script("03_classification.py")
    assert "1,437 images to train on, 360 to test on" in text
    for name, lr in (("SGD", 0.05), ("Adam", 0.002)):
        part = text[text.index(f"\n{name} ") :]
        assert numbers(part.splitlines()[1]) == [lr, lr, lr / 2]
        rows = [numbers(line) for line in part.splitlines()[4:8]]
        assert [row[0] for row in rows] == [1, 2, 3, 4]
        assert [row[5] for row in rows] == pytest.approx([lr, lr, 0.3 * lr, 0.3 * lr])
        for _, torch_loss, torch_accuracy, loss, share, _ in rows:
            assert loss == pytest.approx(torch_loss, abs=2e-4) and share == pytest.approx(torch_accuracy, abs=1)
        assert rows[3][3] < rows[0][3] and rows[3][4] > 70
    assert_drawn(tmp_path / "out" / "03_classification.png", colours.COLOURS["SGD"], colours.COLOURS["Adam"])


def write_idx(path, tensor, opener=open):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, tensor.ndim]) + b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    with opener(path, "wb") as file:
        file.write(header + tensor.numpy().tobytes())


def fashion(folder, opener=open, suffix=""):
    """Four small IDX files in the shape of FashionMNIST's; gives their images and labels."""
    data = []
    for part, count in (("train", 300), ("t10k", 50)):
        labels = torch.arange(count, dtype=torch.uint8) % 10
        images = torch.randint(0, 100, (count, 28, 28), dtype=torch.uint8)
        images[torch.arange(count), labels.long() * 2] += 150  # a bright row tells the class
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images, opener)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels, opener)
        data += [images.flatten(1).float() / 255, labels.long()]
    return data


@pytest.mark.parametrize("torchvision", [False, True], ids=["plain", "torchvision"])
@pytest.mark.parametrize("opener, suffix", [(open, ""), (gzip.open, ".gz")], ids=["raw", "gz"])
def test_idx_files(functions, tmp_path, torchvision, opener, suffix):
    example = functions("03_classification.py")
    written = fashion(tmp_path / "FashionMNIST" / "raw" if torchvision else tmp_path, opener, suffix)
    for read, wanted in zip(example.fashion_mnist(tmp_path), written, strict=True):
        assert torch.equal(read, wanted)


def test_idx_files_that_are_not(functions, tmp_path):
    example = functions("03_classification.py")
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        example.fashion_mnist(tmp_path)
    for size in (2, 9):  # too few bytes and too many
        (tmp_path / "data").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, size, 1, 2, 3]))
        with pytest.raises(ValueError, match=rf"11 bytes do not hold the shape \[{size}\]"):
            example.read_idx(tmp_path, "data")
    (tmp_path / "text").write_text("no picture")
    with pytest.raises(ValueError, match="not an IDX file"):
        example.read_idx(tmp_path, "text")


def test_download_asks_torchvision(functions, tmp_path, monkeypatch, capsys):
    def fashion_mnist(root, download):
        assert download
        fashion(Path(root) / "FashionMNIST" / "raw")  # where the real one leaves the files

    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", types.SimpleNamespace(FashionMNIST=fashion_mnist))
    example = functions("03_classification.py")
    command = ["03_classification.py", "--quick", "--out", str(tmp_path), "--download"]
    monkeypatch.setattr(sys, "argv", [*command, "--data", str(tmp_path / "data")])
    example.main()
    text = capsys.readouterr().out
    assert "300 images to train on, 50 to test on" in text
    losses = [numbers(line)[3] for line in text.splitlines() if re.match(r" +\d ", line)]
    assert losses[3] < losses[0] and losses[7] < losses[4]

    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        example.main()
    assert "--download needs --data" in capsys.readouterr().err


def test_batch_size(script, tmp_path):
    text = script("04_batch_size.py")
    rows = np.array([numbers(line) for line in text.splitlines() if re.match(r" +\d", line)])
    assert rows[:, 0].tolist() == [16, 32, 64, 128, 256]
    assert np.allclose(rows[:, 1] / rows[:, 0], 0.01 / 16)
    scaled, fixed = rows[:, 2], rows[:, 4]
    assert (np.diff(fixed) > 0).all(), "with one lr, larger batches learn less"
    assert np.ptp(scaled) < np.ptp(fixed) / 4, "with lr in proportion, all learn about the same"
    assert_drawn(tmp_path / "out" / "04_batch_size.png", "#440154")


def test_trajectories(script, functions, tmp_path, colours):
    text = script("05_trajectories.py")
    rows = re.findall(r"^ *(?:bowl|saddle) (\w+) +ends at \(.*\) +(\S+) +(\S+) +(\S+)$", text, re.MULTILINE)
    assert len(rows) == 10
    for name, torch_far, outside_far, inside_far in rows:
        assert float(torch_far) < 1e-13 and float(outside_far) < 1e-13
        if name in ("SGD", "Momentum"):
            assert float(inside_far) < 1e-13
        else:
            assert 1e-9 < float(inside_far) < 1e-5, "epsilon inside the root is another formula, by a little"

    used = [colours.COLOURS[name] for name in ("SGD", "Momentum", "Adagrad", "RMSprop", "Adam")]
    for picture in (tmp_path / "out" / "05_trajectories.png", EXAMPLES.parent / "docs" / "images" / "trajectories.png"):
        assert_drawn(picture, *used)
    with Image.open(tmp_path / "out" / "05_trajectories.gif") as animation:
        assert animation.n_frames == 9
        first = np.asarray(animation.convert("RGB"), dtype=int)
        animation.seek(8)
        last = np.asarray(animation.convert("RGB"), dtype=int)
    assert (np.abs(first - last).max(-1) > 50).mean() > 0.005, "the paths move"

    example = functions("05_trajectories.py")
    for function, grad, start, _ in example.SURFACES.values():
        x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        function(x).backward()
        assert np.allclose(grad(np.array(start)), x.grad.numpy(), rtol=1e-15)


def test_checkpoint(script, tmp_path, colours):
    text = script("06_checkpoint.py")
    pattern = r"to the last bit: (\d+) of 60; largest relative difference (\S+); parameters at most (\S+)"
    sgd, adamw = re.findall(pattern, text)
    assert sgd == ("60", "0.0e+00", "0.0e+00")
    assert float(adamw[1]) < 1e-5 and float(adamw[2]) < 1e-5
    for name in ("SGD", "AdamW"):
        assert set(torch.load(tmp_path / "out" / f"06_{name}.pt")) == {"model", "optimizer"}
    assert_drawn(tmp_path / "out" / "06_checkpoint.png", colours.TORCH_FUSED, colours.FASTOPT)


def test_optimizer_state_must_travel(functions, tmp_path, monkeypatch):
    """The checkpoint example can fail: without the optimizer's state, the losses are others."""
    example = functions("06_checkpoint.py")
    path = tmp_path / "checkpoint.pt"
    kept, _ = example.interrupted("SGD", 10, path)
    for optimizer in (torch.optim.SGD, fastopt.SGD):
        monkeypatch.setattr(optimizer, "load_state_dict", lambda self, state: None)
    lost, _ = example.interrupted("SGD", 10, path)
    assert kept[:11] == lost[:11] and all(a != b for a, b in zip(kept[11:], lost[11:], strict=True))


def test_low_precision(script, tmp_path, colours):
    """Remainders train as float32 does; plain bfloat16 stands still."""
    text = script("07_low_precision.py")
    names = ["float32", "bf16, as torch keeps it", "bf16 + remainder, bf16 state", "bf16, stochastic rounding",
             "bf16 + remainder"]  # fmt: skip
    rows = {name: numbers(re.search(rf"^{re.escape(name)}  +(\d.*)", text, re.M)[1]) for name in names}
    kept_and_moved = [(12, 28), (6, 14), (8, 18), (10, 22), (12, 26)]
    assert [tuple(row[:2]) for row in rows.values()] == kept_and_moved
    wide, plain, *others = rows.values()
    assert wide[2] < 3.5, "it has learned"
    assert plain[2] > 1.015 * wide[2] and plain[4] > 3 * wide[4] and plain[5] == 100
    for _, _, loss, off, never, norms in others:
        assert abs(loss / wide[2] - 1) < 0.005 and abs(off) < 0.5
        assert never < plain[4] / 3 and norms < 80
    picture = EXAMPLES.parent / "docs" / "images" / "low-precision.png"
    for drawn in (tmp_path / "out" / "07_low_precision.png", picture):
        assert_drawn(drawn, "#B8BEC6", colours.FASTOPT, "#009E73", "#56B4E9", "#000000")
    assert picture.stat().st_size < 100_000
