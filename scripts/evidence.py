"""What the toy's latent actions hold, and what simpler ones hold: a table, its numbers and a
picture.

    python docs/latent_action/evidence.py       writes evidence.md, evidence.json, latents.png beside this file; what is in
                                                evidence.json already, made in the same way, is not trained again

Labels are those of the target robot on a tenth of all rows. The hand, the arm and the gantry are
never labelled. Everything is measured on episodes of unseen layouts, against the true motion over
one interval:
- probe: R2 of the best linear map from the 14 numbers to the motion, fitted on training rows of the
  same body (of the target robot: on the labelled ones); what the numbers hold.
- direct: R2 of the first three numbers themselves; what alignment makes of them, for a body whose
  labels nobody has.
- EPE: mean distance of decoded from true flow over moving pixels, in pixels; zero flow is the floor
  to beat.

The other ways to make 14 numbers of a motion: the same VAE without alignment, without KL, on a
DC-AE with random weights, or on the difference of the two frames (its 288 largest principal
components in place of the tokens); and 14 principal components of the flow.
"""

import argparse
import json
import platform
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import latent_action
import motus
from worlds import motions

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from worlds.tabletop import Episode, record

BODIES = {"target robot": (6,), "hand": (2,), "arm and gantry": (5,)}
MOTION = ("x", "y", "opening")
VARIANTS = {  # name -> changes of the configuration, features that the VAE compresses
    "flow, aligned": ({}, "tokens"),
    "without alignment": (dict(lambda_action=0.0), "tokens"),
    "without KL": (dict(beta=0.0), "tokens"),
    "random DC-AE": ({}, "random tokens"),
    "frame differences": ({}, "differences"),
}


class Data:
    """Training and held-out pairs, their labels on a tenth of the rows, and every kind of features,
    made when asked for."""

    def __init__(self, episodes: int, model: latent_action.LatentActionModel, pictures: bool):
        self.model = model
        self.episodes = {
            "train": self.shots(episodes, "train", pictures),
            "eval": self.shots(min(20, episodes), "eval"),
        }
        self.pairs = {
            split: motions.toy_pairs(shots, model.config.interval)
            for split, shots in self.episodes.items()
        }
        train = self.pairs["train"]
        pool = [np.flatnonzero((train.level == level).numpy()) for level in motions.LABELLED]
        labelled = torch.zeros(len(train.level), dtype=torch.bool)
        for rows in pool:
            labelled[rows[: len(labelled) // 10 // len(pool)]] = True
        self.pairs["train"] = train._replace(labelled=labelled)
        self.made: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    @staticmethod
    def shots(count: int, split: str, pictures: bool = True) -> list[Episode]:
        """Of the training episodes the baseline of frame differences alone needs pictures."""
        return [
            e
            for level in (2, 3, 4, 5, 6)
            for e in record(level, count, 0, split=split, pictures=pictures)
        ]

    def differences(self, split: str) -> Tensor:
        """(N, 6912): frame i + interval minus frame i."""
        interval, shots = self.model.config.interval, self.episodes[split]
        return (
            torch.stack(
                [
                    torch.from_numpy(
                        shots[e].frames[i + interval].astype(np.float32) - shots[e].frames[i]
                    ).flatten()
                    for e, i in self.pairs[split].index.tolist()
                ]
            )
            / 255
        )

    def features(self, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training rows, their labels and mask, and held-out rows. Tokens come with the
        augmentation of `toy_rows`."""
        if kind not in self.made:
            train, test = self.pairs["train"], self.pairs["eval"]
            if kind == "differences":
                x, y = self.differences("train"), self.differences("eval")
                _, _, axes = torch.pca_lowrank(
                    x[:: max(1, len(x) // 3000)], len(self.model.token_mean), niter=1
                )
                mask = train.labelled[:, None].expand(-1, 3)
                self.made[kind] = x @ axes, train.labels, mask, y @ axes
            else:
                model = self.model
                if kind == "random tokens":
                    torch.manual_seed(1)
                    model = latent_action.LatentActionModel(self.model.config).eval()
                self.made[kind] = (*motions.toy_rows(model, train), tokens_of(model, test.flow))
        return self.made[kind]


@torch.no_grad()
def tokens_of(model: latent_action.LatentActionModel, flow: Tensor) -> Tensor:
    return torch.cat([model.tokens(part) for part in flow.split(256)])


def r2(predicted: Tensor, wanted: Tensor) -> list[float]:
    return (
        1 - (predicted - wanted).square().sum(0) / (wanted - wanted.mean(0)).square().sum(0)
    ).tolist()


def probes(data: Data, z: Tensor, test: Tensor) -> dict[str, list[float]]:
    """R2 per body of a linear map fitted on its training rows z (N, Z), on its held-out rows
    `test`."""
    train, held, found = data.pairs["train"], data.pairs["eval"], {}
    for name, levels in BODIES.items():
        mine = torch.isin(train.level, torch.tensor(levels))
        known, unseen = (
            train.labelled if name == "target robot" else mine,
            torch.isin(held.level, torch.tensor(levels)),
        )
        found[name] = latent_action.probe(
            z[known], train.labels[known], test[unseen], held.labels[unseen]
        ).tolist()
    return found


def epe(made: Tensor, flow: Tensor) -> float:
    """Mean distance over moving pixels of flow (B, H, W, 2), in its pixels."""
    moving = flow.norm(dim=-1) > 0.1
    return (made - flow).norm(dim=-1)[moving].mean().item()


@torch.no_grad()
def measure(data: Data, model: latent_action.LatentActionModel, kind: str) -> dict:
    """All figures of a trained model."""
    train, held = data.pairs["train"], data.pairs["eval"]
    x, _, _, y = data.features(kind)
    (mu, logvar), (test, _) = model.encode(x[: len(train.flow)]), model.encode(y)
    found = {
        "probe": probes(data, mu, test),
        "direct": {},
        "variance": mu.var(dim=0).tolist(),
        "kl": (0.5 * (mu.square() + logvar.exp() - 1 - logvar)).mean(dim=0).tolist(),
    }
    for name, levels in BODIES.items():
        unseen = torch.isin(held.level, torch.tensor(levels))
        found["direct"][name] = r2(test[unseen, :3], held.labels[unseen])
        if kind == "tokens":
            flow = held.flow[unseen][::4]
            alone = latent_action.CODES[model.config.code][1](
                model.picture_of(y[unseen][::4]), model.config.radius
            )
            for key, made in (
                ("epe", model.flow_of(test[unseen][::4])),
                ("epe_dcae", alone),
                ("epe_zero", torch.zeros_like(flow)),
            ):
                found.setdefault(key, {})[name] = epe(made, flow)
    return found


def trained(data: Data, variant: str, seed: int, steps: int) -> latent_action.LatentActionModel:
    changes, kind = VARIANTS[variant]
    torch.manual_seed(seed)
    model = latent_action.LatentActionModel(replace(data.model.config, **changes))
    model.dcae.load_state_dict(data.model.dcae.state_dict())
    x, labels, mask, _ = data.features(kind)
    latent_action.fit(model, x, labels, mask, steps, seed=seed)
    return model


@torch.no_grad()
def picture(data: Data, model: latent_action.LatentActionModel, out: Path) -> None:
    """Above: motions of each body, their colours, what the DC-AE and the 14 numbers keep. Below:
    the first motion with one number turned up and down, and the others as they go with it on
    average (a line fitted to the target robot's rows)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    held, radius = data.pairs["eval"], model.config.radius
    rows = []
    for level, moves in ((6, 0), (6, 2), (2, 0), (2, 2), (5, 0)):
        mine = (held.level == level).nonzero()[:, 0]
        speed = held.labels[mine].abs()
        rows.append(
            mine[(speed[:, moves] - (speed[:, :2].sum(1) if moves == 2 else 0)).argmax()].item()
        )
    flow = held.flow[rows]
    tokens = model.tokens(flow)
    mu = model.encode(tokens)[0]
    kept = {
        "DC-AE": latent_action.CODES[model.config.code][1](model.picture_of(tokens), radius),
        "14 numbers": model.flow_of(mu),
    }
    colours = lambda x: (
        (latent_action.flow_to_colour(x, radius) / 2 + 0.5).permute(0, 2, 3, 1).clamp(0, 1).numpy()
    )
    seen = model.encode(data.features("tokens")[0][: len(data.pairs["train"].flow)])[0][
        data.pairs["train"].level == 6
    ]
    turns = [*range(3), 3 + int(seen.var(dim=0)[3:].argmax())]
    figure, axes = plt.subplots(5 + len(turns), 5, figsize=(7, 12.6), constrained_layout=True)
    for line, row in zip(axes, range(5)):
        frame = data.episodes["eval"][held.index[rows[row], 0]].frames[held.index[rows[row], 1]]
        for axis, (title, shown) in zip(
            line,
            [
                ("frame and true flow", frame),
                ("its colours", colours(flow[row : row + 1])[0]),
                *((name, colours(x[row : row + 1])[0]) for name, x in kept.items()),
            ],
        ):
            axis.imshow(shown), axis.set_title(title if row == 0 else "", fontsize=8)
        y, x = np.nonzero((flow[row].norm(dim=-1) > 0.1).numpy())
        arrows = flow[row].numpy()[y[::2], x[::2]].T
        line[0].quiver(
            x[::2],
            y[::2],
            *arrows,
            angles="xy",
            scale_units="xy",
            scale=1,
            color="white",
            width=0.006,
        )
        beside = zip(MOTION, held.labels[rows[row]], mu[row])
        line[4].text(
            0, 0.5, "\n".join(f"{name} {a:+.2f}, mu {b:+.2f}" for name, a, b in beside), fontsize=8
        )
    for line, d in zip(axes[5:], turns):
        away = seen - seen.mean(dim=0)
        slope = (away * away[:, d : d + 1]).mean(dim=0) / away[:, d].square().mean()
        for axis, value in zip(line, (-2.0, -1.0, 0.0, 1.0, 2.0)):
            z = mu[0] + slope * value * away[:, d].std()
            axis.imshow(colours(model.flow_of(z[None]))[0])
            axis.set_title(f"{MOTION[d] if d < 3 else f'number {d}'} {value:+.0f} std", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(out, dpi=90)
    plt.close(figure)


def spread(values: list[float]) -> str:
    """Mean over seeds, with the range if there are several."""
    middle = f"{np.mean(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


def table(results: dict, about: str) -> str:
    """evidence.md."""
    runs = lambda variant: [r for key, r in results["runs"].items() if key.split("/")[0] == variant]
    lines = [
        f"# What the toy's latent actions hold\n\n{about}\n",
        "R2 of the motion in x, y and opening on held-out episodes, mean over "
        "seeds (least to most). `probe`: best linear map; `direct`: the first three numbers as they are.\n",
        "| 14 numbers from | body | probe x | probe y | probe opening | direct x | direct y | direct opening |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        for body in BODIES if runs(variant) else ():
            cells = [
                spread([r[kind][body][d] for r in runs(variant)])
                for kind in ("probe", "direct")
                for d in range(3)
            ]
            if VARIANTS[variant][0].get("lambda_action") == 0.0:
                cells[3:] = ["-"] * 3
            lines.append(
                f"| {variant} | {body}{'' if body == 'target robot' else ', never labelled'} | {' | '.join(cells)} |"
            )
    for name, found in results["linear"].items():
        for body, values in found.items():
            lines.append(
                f"| {name} | {body}{'' if body == 'target robot' else ', never labelled'} | "
                f"{' | '.join(f'{v:.2f}' for v in values)} | - | - | - |"
            )
    lines += [
        "\n| | active dimensions (variance of mu > 0.01) | KL per dimension, nats, largest first |",
        "|---|---|---|",
    ]
    for variant in VARIANTS:
        if runs(variant):
            kl = np.mean([sorted(r["kl"], reverse=True) for r in runs(variant)], axis=0)
            active = "/".join(str(sum(v > 0.01 for v in r["variance"])) for r in runs(variant))
            lines.append(f"| {variant} | {active} of 14 | {' '.join(f'{v:.1f}' for v in kl)} |")
    lines += [
        "\nReconstruction: mean end-point error over moving pixels, in pixels of 48.\n",
        "| 14 numbers from | body | zero flow | DC-AE alone | through 14 numbers |",
        "|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        for body in BODIES if runs(variant) and "epe" in runs(variant)[0] else ():
            cells = [
                spread([r[key][body] for r in runs(variant)])
                for key in ("epe_zero", "epe_dcae", "epe")
            ]
            lines.append(
                f"| {variant} | {body} | {cells[0].split()[0]} | {cells[1].split()[0]} | {cells[2]} |"
            )
    return "\n".join(lines) + "\n\n![Motions and traversals](latents.png)\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/latent_action"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=80, help="per level")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(VARIANTS),
        choices=VARIANTS,
        help="others stay as evidence.json has them",
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument(
        "--dcae", type=Path, default=motus.PRESETS["toy"].backbones / "dcae.safetensors"
    )
    parser.add_argument("--date", default="2026-11-23")
    args = parser.parse_args(argv)
    model = latent_action.LatentActionModel(
        latent_action.LatentActionConfig.of(motus.PRESETS["toy"].latent)
    ).eval()
    model.load_dcae(args.dcae)
    results: dict[str, dict] = {"runs": {}, "linear": {}}
    if (stored := args.out / "evidence.json").exists():
        results |= {key: json.loads(stored.read_text())[key] for key in results}
    made = {
        kind: [args.episodes, args.steps, *([model.dcae_fingerprint()] if kind == "tokens" else [])]
        for kind in ("tokens", "random tokens", "differences")
    }
    due = [
        (variant, seed)
        for variant in args.variants
        for seed in range(args.seeds)
        if results["runs"].get(f"{variant}/{seed}", {}).get("made") != made[VARIANTS[variant][1]]
    ]
    data = Data(
        args.episodes, model, any(VARIANTS[variant][1] == "differences" for variant, _ in due)
    )
    train, held = data.pairs["train"], data.pairs["eval"]
    for variant, seed in due:
        fitted = trained(data, variant, seed, args.steps)
        found = results["runs"][f"{variant}/{seed}"] = measure(
            data, fitted, VARIANTS[variant][1]
        ) | {"made": made[VARIANTS[variant][1]]}
        print(variant, seed, json.dumps({k: found[k] for k in ("probe", "direct")}), flush=True)
        stored.write_text(json.dumps(results, indent=1))
        if (variant, seed) == ("flow, aligned", 0):
            picture(data, fitted, args.out / "latents.png")
    flat = lambda pairs: pairs.flow.flatten(1)
    middle, x = flat(train).mean(dim=0), flat(train)
    _, _, axes = torch.pca_lowrank(x[:: max(1, len(x) // 3000)] - middle, 14, niter=2)
    results["linear"]["PCA of the flow"] = probes(
        data, (x - middle) @ axes, (flat(held) - middle) @ axes
    )
    tokens, _, _, test = data.features("tokens")
    results["linear"]["all 288 numbers of the DC-AE, the most to be had"] = probes(
        data, tokens[: len(train.flow)], test
    )
    about = (
        f"`python docs/latent_action/evidence.py --episodes {args.episodes} --steps {args.steps} --seeds {args.seeds}`: that many "
        f"training episodes of each level ({len(train.flow):,} rows, {train.labelled.sum().item():,} labelled), held-out ones "
        f"({len(held.flow):,} rows); DC-AE of weights/toy. 2-core AMD EPYC virtual machine, torch {torch.__version__.split('+')[0]} "
        f"CPU, Python {platform.python_version()}, {args.date}."
    )
    stored.write_text(json.dumps({"about": about, **results}, indent=1))
    (args.out / "evidence.md").write_text(table(results, about))
    print(f"wrote {args.out / 'evidence.md'}")


if __name__ == "__main__":
    main()
