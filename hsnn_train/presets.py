"""MoNN presets: the five rows of the paper's Table 5, and a small ladder that trains on two CPU cores.

A preset is a plain function of nothing that returns a `MoNNConfig`; a recipe names one preset per layer.
Widths ``num_embed x dim`` of the five Table 5 presets are the paper's; the paper leaves hidden sizes and depths
open, and ours are chosen so that the FLOPs of a single inference stand in the ratios of Table 1
(`hsnn info presets` counts and prints them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hsnn_core.errors import SchemaError


@dataclass(frozen=True)
class TowerConfig:
    """An EDCN-style tower (paper §2, "Tower Network").

    Attributes:
        num_embed: number of output embeddings (nu, ni or nx).
        dim: width of each output embedding.
        blocks: stacked (MLP beside AttentionFM) blocks.
        hidden: hidden width of a block's MLP.
        max_fields: cap on the fields that enter the pairwise AttentionFM; more are first mixed down linearly,
            because pairs grow as F(F-1)/2.
    """

    num_embed: int
    dim: int
    blocks: int = 1
    hidden: int = 32
    max_fields: int = 16


@dataclass(frozen=True)
class TrunkConfig:
    """What MoNNs share: field embeddings, the encoder of histories, and the two-tower vectors on top of them.

    Attributes:
        embed: width e of a feature's field embedding, and of the two-tower vectors.
        history_blocks: transformer blocks over each sequence; 0 pools it by attention alone.
        heads: attention heads of those blocks; must divide ``embed``.
        hidden: hidden width of the two-tower vectors' networks.
        max_fields: as in `TowerConfig`.
    """

    embed: int
    history_blocks: int = 0
    heads: int = 2
    hidden: int = 16
    max_fields: int = 8


@dataclass(frozen=True)
class OverArchConfig:
    """A DHEN-style OverArch (paper §2; Zhang et al. 2022).

    Attributes:
        kind: "dhen"; "dot" for the two-tower scorer, one inner product; "mol" for a mixture of logits.
        layers: stacked ensemble layers.
        tokens: tokens each layer puts out.
        modules: interaction modules run in parallel in a layer, of "fm", "cross", "mlp", "attention".
        hidden: hidden width of the MLP module, rank of the cross module and hidden width of the head.
        feed_forward: hidden width of the attention module's token-wise feed-forward; 0 for none.
        heads: attention heads; must divide the width.
    """

    kind: str = "dhen"
    layers: int = 1
    tokens: int = 2
    modules: tuple[str, ...] = ("fm", "mlp")
    hidden: int = 32
    feed_forward: int = 0
    heads: int = 4


@dataclass(frozen=True)
class MoNNConfig:
    """One Modular Neural Network. ``cross`` is the width of the interaction tower's field embeddings. Layers of
    one model whose ``trunk`` is equal share it."""

    name: str
    trunk: TrunkConfig
    cross: int
    user: TowerConfig
    item: TowerConfig
    interaction: TowerConfig | None
    over: OverArchConfig


def two_tower_xs() -> MoNNConfig:
    """Table 5 "Two Tower Tiny": 1x40 and 1x40, one dot product."""
    return MoNNConfig(
        name="two_tower_xs",
        trunk=TrunkConfig(40, hidden=8, max_fields=2),
        cross=0,
        user=TowerConfig(1, 40, blocks=1, hidden=20, max_fields=6),
        item=TowerConfig(1, 40, blocks=1, hidden=20, max_fields=6),
        interaction=None,
        over=OverArchConfig(kind="dot"),
    )


def small() -> MoNNConfig:
    """Table 5 "MoNN Small": 8x40, 1x40, 1x40 and a thin OverArch."""
    return MoNNConfig(
        name="small",
        trunk=TrunkConfig(8),
        cross=8,
        user=TowerConfig(8, 40, blocks=1, hidden=32, max_fields=8),
        item=TowerConfig(1, 40, blocks=1, hidden=32, max_fields=8),
        interaction=TowerConfig(1, 40, blocks=1, hidden=16, max_fields=6),
        over=OverArchConfig(layers=1, tokens=1, modules=("fm", "mlp"), hidden=24),
    )


def medium() -> MoNNConfig:
    """Table 5 "MoNN Medium": 10x48, 4x48, 1x48."""
    return MoNNConfig(
        name="medium",
        trunk=TrunkConfig(24),
        cross=24,
        user=TowerConfig(10, 48, blocks=2, hidden=256, max_fields=24),
        item=TowerConfig(4, 48, blocks=2, hidden=256, max_fields=24),
        interaction=TowerConfig(1, 48, blocks=1, hidden=96, max_fields=12),
        over=OverArchConfig(layers=3, tokens=8, modules=("fm", "cross", "mlp", "attention"), hidden=256,
                            feed_forward=192),
    )  # fmt: skip


def large() -> MoNNConfig:
    """Table 5 "MoNN Large": 30x48, 8x48, 1x48; a deep, wide OverArch."""
    return MoNNConfig(
        name="large",
        trunk=TrunkConfig(48),
        cross=48,
        user=TowerConfig(30, 48, blocks=3, hidden=8192, max_fields=64),
        item=TowerConfig(8, 48, blocks=2, hidden=1024, max_fields=32),
        interaction=TowerConfig(1, 48, blocks=2, hidden=512, max_fields=32),
        over=OverArchConfig(layers=24, tokens=40, modules=("fm", "cross", "mlp", "attention"), hidden=4096,
                            feed_forward=4096),
    )  # fmt: skip


def xl() -> MoNNConfig:
    """Table 5 "MoNN XL": 80x96, 4x96, 1x96."""
    return MoNNConfig(
        name="xl",
        trunk=TrunkConfig(96),
        cross=96,
        user=TowerConfig(80, 96, blocks=3, hidden=16384, max_fields=64),
        item=TowerConfig(4, 96, blocks=3, hidden=4096, max_fields=64),
        interaction=TowerConfig(1, 96, blocks=2, hidden=1024, max_fields=32),
        over=OverArchConfig(layers=24, tokens=88, modules=("fm", "cross", "mlp", "attention"), hidden=8192,
                            feed_forward=8192, heads=8),
    )  # fmt: skip


#: The trunk of the CPU ladder. Every rung has the same, so a two-tower of it is no weaker in its features, its
#: history encoder or its width; the rungs differ in what they add above the inner product.
CPU_TRUNK = TrunkConfig(64, history_blocks=1, heads=2, hidden=64, max_fields=8)


def cpu_xs() -> MoNNConfig:
    """The two-tower rung: one inner product."""
    return MoNNConfig(
        "cpu_xs", CPU_TRUNK, 0, TowerConfig(1, 64), TowerConfig(1, 64), None, OverArchConfig("dot")
    )


def cpu_s() -> MoNNConfig:
    """The item layer's rung: a thin OverArch."""
    return MoNNConfig(
        name="cpu_s",
        trunk=CPU_TRUNK,
        cross=4,
        user=TowerConfig(4, 16, blocks=1, hidden=64, max_fields=8),
        item=TowerConfig(1, 16, blocks=1, hidden=64, max_fields=8),
        interaction=TowerConfig(1, 16, blocks=1, hidden=8, max_fields=4),
        over=OverArchConfig(layers=1, tokens=1, modules=("fm", "mlp"), hidden=16),
    )


def cpu_m() -> MoNNConfig:
    """A node scorer: more embeddings, and attention."""
    return MoNNConfig(
        name="cpu_m",
        trunk=CPU_TRUNK,
        cross=8,
        user=TowerConfig(6, 24, blocks=1, hidden=64, max_fields=8),
        item=TowerConfig(2, 24, blocks=1, hidden=64, max_fields=8),
        interaction=TowerConfig(1, 24, blocks=1, hidden=16, max_fields=6),
        over=OverArchConfig(layers=1, tokens=2, modules=("fm", "mlp", "attention"), hidden=40),
    )


def cpu_l() -> MoNNConfig:
    """The coarse node scorer: every DHEN module."""
    return MoNNConfig(
        name="cpu_l",
        trunk=CPU_TRUNK,
        cross=16,
        user=TowerConfig(8, 32, blocks=1, hidden=96, max_fields=8),
        item=TowerConfig(4, 32, blocks=1, hidden=96, max_fields=8),
        interaction=TowerConfig(1, 32, blocks=1, hidden=48, max_fields=8),
        over=OverArchConfig(layers=2, tokens=4, modules=("fm", "cross", "mlp", "attention"), hidden=80),
    )


def cpu_xl() -> MoNNConfig:
    """The largest rung: what a flat scorer of two cores can still rank a data set with."""
    return MoNNConfig(
        name="cpu_xl",
        trunk=CPU_TRUNK,
        cross=32,
        user=TowerConfig(12, 48, blocks=1, hidden=128, max_fields=8),
        item=TowerConfig(4, 48, blocks=1, hidden=128, max_fields=8),
        interaction=TowerConfig(1, 48, blocks=1, hidden=64, max_fields=8),
        over=OverArchConfig(layers=3, tokens=4, modules=("fm", "cross", "mlp", "attention"), hidden=144,
                            feed_forward=96),
    )  # fmt: skip


def cpu_mol() -> MoNNConfig:
    """Mixture of logits on the ladder's trunk, the strongest scorer that is not one inner product."""
    return MoNNConfig(
        name="cpu_mol",
        trunk=CPU_TRUNK,
        cross=0,
        user=TowerConfig(4, 32, blocks=1, hidden=96, max_fields=8),
        item=TowerConfig(4, 32, blocks=1, hidden=96, max_fields=8),
        interaction=None,
        over=OverArchConfig(kind="mol", tokens=4, hidden=32),
    )


PRESETS: dict[str, Callable[[], MoNNConfig]] = {
    f.__name__: f
    for f in (two_tower_xs, small, medium, large, xl, cpu_xs, cpu_s, cpu_m, cpu_l, cpu_xl, cpu_mol)
}

#: FLOPs of a single inference relative to MoNN Small, as Table 1 prints them.
PAPER_FLOPS_RATIO = {"two_tower_xs": 0.25, "small": 1.0, "medium": 50.0, "large": 30_000.0, "xl": 200_000.0}

#: Orders of magnitude of Table 5's feature counts: user, item, interaction.
PAPER_FEATURES = {
    "two_tower_xs": (100, 100, 0),
    "small": (100, 100, 10),
    "medium": (100, 100, 10),
    "large": (1000, 100, 100),
    "xl": (1000, 1000, 100),
}


def preset(name: str) -> MoNNConfig:
    """The preset of that name. Raises SchemaError that lists the known ones."""
    if not isinstance(name, str) or name not in PRESETS:
        raise SchemaError(f"model.layers: unknown preset {name!r}; known presets: {', '.join(PRESETS)}")
    return PRESETS[name]()


def reads_interactions(names: Sequence[str]) -> tuple[bool, ...]:
    """Of every layer by its preset, whether its MoNN reads interactions."""
    return tuple(preset(name).interaction is not None for name in names)
