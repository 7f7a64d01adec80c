"""Two and three dimensions: the paths of five optimizers on a bowl and past a saddle, drawn, animated and checked.

The check is against the textbook's formulas, written out below in a few lines of numpy. The textbook puts epsilon
inside the square root, sqrt(s + eps); torch adds it to the root, sqrt(s) + eps, as Adam's paper does. fastopt follows
torch: a checkpoint, an eps and a learning rate keep their meaning when one library takes the other's place. The
difference is small until s is: inside the root, eps = 1e-6 keeps the denominator above 1e-3; outside, above 1e-6.
"""

import io

import numpy as np
import torch
from common import COLOURS, arguments, plt, save
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image

import fastopt

EPS = 1e-6
LAND = LinearSegmentedColormap.from_list("land", ["#B4C2D3", "#FCFCFA"])
WIDTHS = {"SGD": 1.6, "Momentum": 1.6, "Adagrad": 4.5, "RMSprop": 2.6, "Adam": 1.3}  # lines on one another stay visible
SADDLE_BOX = ((-1.4, -1.1), (2.4, 3.3))


def bowl(x):
    """w.x**2 with w = (0.2, 2): ten times as steep along x1 as along x0; its lowest point is (0, 0)."""
    return 0.2 * x[0] ** 2 + 2 * x[1] ** 2


def bowl_grad(x):
    return np.array([0.4 * x[0], 4 * x[1]])


def saddle(x):
    """x0^2 + x1^2 + x1^3 + x0 x1: a hollow at (0, 0), a saddle at (1/4, -1/2), and no bottom beyond it."""
    return x[0] ** 2 + x[1] ** 2 + x[1] ** 3 + x[0] * x[1]


def saddle_grad(x):
    return np.array([2 * x[0] + x[1], 2 * x[1] + 3 * x[1] ** 2 + x[0]])


SURFACES = {  # name: (function, its gradient by hand, start, lr of each optimizer)
    "bowl": (bowl, bowl_grad, (3.0, 4.0), {"SGD": 0.4, "Adagrad": 1.5, "RMSprop": 0.3, "Momentum": 0.1, "Adam": 0.5}),
    "saddle": (saddle, saddle_grad, (2.0, 3.0),
               {"SGD": 0.04, "Adagrad": 0.6, "RMSprop": 0.2, "Momentum": 0.01, "Adam": 0.2}),
}
SETTINGS = {  # name: (class, options besides lr)
    "SGD": ("SGD", {}),
    "Momentum": ("SGD", {"momentum": 0.7}),
    "Adagrad": ("Adagrad", {"eps": EPS}),
    "RMSprop": ("RMSprop", {"alpha": 0.9, "eps": EPS}),
    "Adam": ("Adam", {"betas": (0.9, 0.999), "eps": EPS}),
}


def path(name, function, start, lr, steps, library=fastopt):
    """The points an optimizer visits, from the start on: (steps + 1, 2), in double precision."""
    x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    cls, options = SETTINGS[name]
    optimizer = getattr(library, cls)([x], lr=lr, **options)
    points = [x.detach().numpy().copy()]
    for _ in range(steps):
        optimizer.zero_grad()
        function(x).backward()
        optimizer.step()
        points.append(x.detach().numpy().copy())
    return np.array(points)


def textbook(name, grad, start, lr, steps, root):
    """The same points by the textbook's formulas; `root` is the square root with its epsilon, inside or outside."""
    x, v, s = np.array(start), np.zeros(2), np.zeros(2)
    points = [x]
    for t in range(1, steps + 1):
        g = grad(x)
        if name == "SGD":
            x = x - lr * g
        elif name == "Momentum":
            v = 0.7 * v + lr * g
            x = x - v
        elif name == "Adagrad":
            s = s + g**2
            x = x - lr * g / root(s)
        elif name == "RMSprop":
            s = 0.9 * s + 0.1 * g**2
            x = x - lr * g / root(s)
        else:  # Adam
            v = 0.9 * v + 0.1 * g
            s = 0.999 * s + 0.001 * g**2
            x = x - lr * (v / (1 - 0.9**t)) / root(s / (1 - 0.999**t))
        points.append(x)
    return np.array(points)


def inside(s):
    """The textbook's root."""
    return np.sqrt(s + EPS)


def outside(s):
    """torch's root, and ours."""
    return np.sqrt(s) + EPS


def check(steps):
    """Prints how far fastopt's points are from torch's and from the textbook's, epsilon inside and outside."""
    print("largest distance of fastopt's points from  torch.optim  textbook, eps outside  textbook, eps inside root")
    for surface, (function, grad, start, rates) in SURFACES.items():
        for name, lr in rates.items():
            ours = path(name, function, start, lr, steps)
            others = [path(name, function, start, lr, steps, library=torch.optim)]
            others += [textbook(name, grad, start, lr, steps, root) for root in (outside, inside)]
            far = [np.abs(ours - other).max() for other in others]
            print(f"{surface:>8} {name:9} {f'ends at ({ours[-1][0]:.3f}, {ours[-1][1]:.3f})':>23}"
                  f"{far[0]:13.1e} {far[1]:22.1e} {far[2]:26.1e}")


def drawn(loss):
    """Loss to height in the landscape: a straight line near 0, a logarithm far from it, so that the saddle shows."""
    return np.arcsinh(5 * loss)


def draw_map(axis, surface, low, high):
    """The surface from above: darker is lower; a star at the lowest point (bowl) or the hollow (saddle)."""
    x0, x1 = np.meshgrid(np.linspace(low[0], high[0], 80), np.linspace(low[1], high[1], 80))
    height = drawn(SURFACES[surface][0]((x0, x1)))
    axis.contourf(x0, x1, height, levels=16, cmap=LAND)
    axis.contour(x0, x1, height, levels=16, colors="#8E99A6", linewidths=0.5, linestyles="solid")
    axis.plot(0, 0, "*", color="black", markersize=11)
    axis.set(xlabel="x0", ylabel="x1", xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axis.grid(False)


def draw_landscape(axis, low, high):
    """The saddle in three dimensions; paths are drawn above it, whatever the viewing angle."""
    x0, x1 = np.meshgrid(np.linspace(low[0], high[0], 26), np.linspace(low[1], high[1], 26))
    height = drawn(saddle((x0, x1)))
    axis.plot_surface(x0, x1, height, cmap=LAND, rcount=26, ccount=26, edgecolor="#A9B4C0", linewidth=0.3)
    axis.computed_zorder = False
    ticks = np.array([-0.5, 0, 1, 5, 40])
    axis.set(xlabel="x0", ylabel="x1", zlabel="loss", xticks=(-1, 0, 1, 2), yticks=(-1, 0, 1, 2, 3))
    axis.set_zticks(drawn(ticks), labels=[f"{tick:g}" for tick in ticks])
    axis.set_box_aspect((1, 1.1, 0.8), zoom=0.98)


def layout():
    """The figure with its three panels, and one empty line for each optimizer in each panel."""
    figure = plt.figure(figsize=(15, 5))
    places = figure.add_gridspec(1, 3, width_ratios=(1, 1, 1.15))
    axes = [figure.add_subplot(place, projection=kind) for place, kind in zip(places, (None, None, "3d"), strict=True)]
    draw_map(axes[0], "bowl", (-3.4, -3), (3.6, 4.6))
    axes[0].set_title("w.x**2, w = (0.2, 2), from (3, 4)")
    draw_map(axes[1], "saddle", *SADDLE_BOX)
    axes[1].plot(0.25, -0.5, "X", color="black", markersize=8)
    axes[1].text(0.2, -0.68, "saddle", ha="right")
    axes[1].text(0.05, 0.08, "hollow")
    axes[1].set_title("x0**2 + x1**2 + x1**3 + x0 x1, from (2, 3)")
    draw_landscape(axes[2], *SADDLE_BOX)
    axes[2].set_title("the same as a landscape")
    lines = {}
    for place, axis in enumerate(axes):
        for name, width in WIDTHS.items():
            nothing = [[]] * (3 if place == 2 else 2)
            lines[name, place] = axis.plot(*nothing, "o-", color=COLOURS[name], linewidth=width, markersize=width + 1.5,
                                           label=name, zorder=10)[0]
    figure.legend(handles=[lines[name, 0] for name in WIDTHS], loc="outside lower center", ncols=len(WIDTHS))
    figure.draw_artist(axes[2])  # before matplotlib 3.11, ticks in three dimensions find their places by being drawn
    figure.canvas.draw()
    figure.set_layout_engine("none")  # places are settled: working them out again for each frame is slow
    return figure, axes, lines


def show(step, steps, paths, axes, lines):
    """Draws every path up to this step, and turns the landscape a little."""
    for (name, place), line in lines.items():
        points = paths["saddle" if place else "bowl", name][: step + 1].T
        if place < 2:
            line.set_data(points)
        else:
            on_land = (points[0] >= SADDLE_BOX[0][0]) & (points[1] >= SADDLE_BOX[0][1])
            line.set_data_3d(*points[:, on_land], drawn(saddle(points[:, on_land])))
    axes[2].view_init(elev=32, azim=-65 + 35 * step / steps)


def main():
    options = arguments(__doc__.splitlines()[0]).parse_args()
    steps = 8 if options.quick else 40
    check(steps)

    paths = {(surface, name): path(name, function, start, lr, steps)
             for surface, (function, _, start, rates) in SURFACES.items() for name, lr in rates.items()}
    figure, axes, lines = layout()
    frames = []
    for step in range(steps + 1):
        show(step, steps, paths, axes, lines)
        with io.BytesIO() as buffer:
            figure.savefig(buffer, format="png", dpi=70)
            frames.append(Image.open(buffer).convert("RGB"))
    # one palette for all frames, from the last, which has every colour: colours must not jump
    palette = frames[-1].quantize(colors=256, method=Image.Quantize.MEDIANCUT, kmeans=2)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / "05_trajectories.gif"
    durations = [160] * steps + [2500]  # milliseconds; the last frame stays
    frames[0].save(target, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    print(f"animation: {target}")
    save(figure, options.out, "05_trajectories.png")


if __name__ == "__main__":
    main()
