"""A layer's scorer with the candidate axis last, for serving.

`HSNN.score` keeps an embedding's few floats together, (B, C, F, e) with e of 4 to 48, as training reads best. An engine
on a CPU then spends its time on loops of 4 floats: of a request, nine tenths went into the scorers' reductions,
normalisations and products of tiny matrices (docs/performance.md). Here the same weights are applied to (B, F, e, C):
every loop runs over candidates that lie side by side, every linear layer is one matrix product with them as its
columns. The mixing of the interaction tower's fields is folded into what makes them.

The same sums in another order: results differ from `HSNN.score` by rounding. The parity gates compare with that.

Letters: B users, C candidates, F fields, e field width, m = ni + nx pair tokens, nu user tokens, d width, k tokens put
out by a layer, P pairs, h heads, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hsnn_train.ensemble import LayerEnsemble
from hsnn_train.hsnn import HSNN
from hsnn_train.monn import CROSS_DENSE, InteractionTower, MoNN
from hsnn_train.overarch import (
    AttentionModule,
    CrossModule,
    DHENOverArch,
    EnsembleLayer,
    FMModule,
    MLPModule,
    SplitLinear,
)
from hsnn_train.towers import AttentionFM, FieldGate, TowerBlock, TowerNetwork

# Products of all pairs of tokens are written out here, k(k+1)/2 * d floats per candidate; beyond this many tokens a
# product of matrices per candidate is the better form.
MOST_TOKENS = 8
# Row numbers of the table of crossed ids are computed in float32, which holds whole numbers up to here.
MOST_ROWS = 1 << 24


def has_column_form(model: object, layer: int) -> bool:
    """Whether `ColumnScorer` can evaluate ``layer`` (from 1) of the model: a DHEN OverArch of few tokens, and not too
    many different ids to match."""
    if not isinstance(model, HSNN):
        return False
    config = model.layer(layer).config
    crossings = config.interaction.num_embed if config.interaction is not None else 0
    tokens = max(config.item.num_embed + crossings, config.over.tokens)
    tower = model.layer(layer).interaction
    rows = (
        0
        if tower is None
        else sum(len(tower.tables.weight(space)) * n for space, n in _matches(tower).items())
    )
    return config.over.kind == "dhen" and tokens <= MOST_TOKENS and rows < MOST_ROWS


class ColumnScorer(nn.Module):
    """`HSNN.score` of one layer: same inputs, same outputs up to rounding. The model's own parameters are used."""

    def __init__(self, model: HSNN, layer: int) -> None:
        super().__init__()
        monn, ensemble = model.layer(layer), model.ensemble[layer - 1]
        assert isinstance(monn.over, DHENOverArch) and isinstance(ensemble, LayerEnsemble)
        self.monn, self.over, self.ensemble = monn, monn.over, ensemble
        self.tasks = model.tasks
        self.interaction = None if monn.interaction is None else _Interaction(monn.interaction)
        # Which floats of a packed embedding the towers read: one product with all of it is quicker than slices of it.
        select = torch.eye(monn.item_width)[monn.item_vector_width :]
        self.register_buffer("node", select, persistent=False)
        self.register_buffer("earlier", _weights_of_earlier(ensemble.weight.detach()), persistent=False)

    def forward(
        self,
        user: Tensor,
        item: Tensor,
        cross_dense: Tensor | None,
        cross_ids: Tensor | None,
        previous: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """user (B, U), item (B, C, E), cross_dense (B, C, 3P), cross_ids (B, C, M), previous (B, C, (l-1)T) ->
        MoNN logits and ensemble logits, (B, C, T) both."""
        monn: MoNN = self.monn
        width = monn.user_vector_width, monn.item_vector_width
        vectors = user[..., : width[0]].reshape(-1, width[0] // width[1], width[1])  # (B, T, e)
        tokens = user[..., width[0] :].reshape(
            -1, monn.config.user.num_embed, monn.config.user.dim
        )  # (B, nu, du)
        dot = monn.dot
        scaled = vectors * (torch.exp(dot.log_scale) / dot.width).unsqueeze(-1)
        scaled = nn.functional.pad(scaled, (0, _size(self.node, 0)))  # type: ignore[arg-type]
        select: Tensor = self.node + torch.zeros_like(scaled[:, :1, :1])  # type: ignore[operator]
        products = torch.matmul(torch.cat([scaled, select], dim=1), item.transpose(-1, -2))
        logits = products[:, : self.tasks] + dot.bias.unsqueeze(-1)
        node = products[:, self.tasks :]  # (B, ni * d, C)

        pair = _regroup(node, monn.config.item.num_embed, monn.config.item.dim)  # (B, ni, d, C)
        if self.interaction is not None:
            crossing = self.interaction(tokens, node, cross_dense, cross_ids)  # (B, nx, dx, C)
            if monn.cross_align is not None:
                crossing = _linear(monn.cross_align, crossing)
            pair = torch.cat([pair, crossing], dim=1)
        if monn.user_align is not None:
            tokens = monn.user_align(tokens)
        own = logits + _over(self.over, tokens, pair)  # (B, T, C)

        # The ensemble is linear: each layer's logits times their weights, added up (paper §3.1).
        weight = self.ensemble.weight  # (l, T)
        total = own * weight[-1].unsqueeze(-1) + self.ensemble.bias.unsqueeze(-1)
        if previous is not None:
            total = total + torch.matmul(self.earlier, previous.transpose(-1, -2))  # type: ignore[arg-type]
        if cross_dense is not None and self.ensemble.reads_crossings:
            total = total + torch.matmul(self.ensemble.crossing.T, cross_dense.transpose(-1, -2))
        return own.transpose(-1, -2), total.transpose(-1, -2)


def _weights_of_earlier(weight: Tensor) -> Tensor:
    """The ensemble's weights (l, T) of the layers before the last, as a matrix (T, (l-1) * T)."""
    return torch.cat([weight[:0].T, *(torch.diag(row) for row in weight[:-1])], dim=1)


def _matches(tower: InteractionTower) -> dict[str, int]:
    """By id space the most matches of an interaction in it."""
    most: dict[str, int] = {}
    for space, start, stop in tower.cross.specs:
        most[space] = max(most.get(space, 1), stop - start)
    return most


class _Interaction(nn.Module):
    """`InteractionTower`: (B, nu, du), (B, ni * di, C), crossings -> (B, nx, dx, C).

    Everything before the tower network's norm is linear in the crossings, in the rows of the tables, in the user's
    and in the node's embeddings. So the mixing of many fields into few is done once, in the weights.

    A gather per matched id costs more than its rows, so there is one, of all ids of a candidate. Its table holds the
    spaces' tables one after the other, and those of several matches once more for each number of them, divided by it:
    the sum of a candidate's rows is their mean.
    """

    def __init__(self, tower: InteractionTower) -> None:
        super().__init__()
        self.tower = tower
        network, specs = tower.network, tower.cross.specs
        kept, fields = network.mixed_fields
        mix = torch.eye(fields) if network.mix is None else network.mix.weight.detach()  # (kept, F)
        self.kept, self.width = kept, tower.tables.width
        width = self.width

        def mixed(column: int, weight: Tensor) -> Tensor:
            """weight (e, n) of the field ``column`` -> (kept * e, n)."""
            return (mix[:, column, None, None] * weight).flatten(0, 1)

        dense = torch.zeros(kept * width, CROSS_DENSE * len(specs))
        bias = torch.zeros(kept * width, 1)
        for place, linear in enumerate(tower.dense):
            assert isinstance(linear, nn.Linear)
            part = slice(CROSS_DENSE * place, CROSS_DENSE * (place + 1))
            dense[:, part] = mixed(2 * place, linear.weight.detach())
            bias += mixed(2 * place, linear.bias.detach().unsqueeze(-1))
        self.crossed = bool(specs)
        if specs:
            self._gather(tower, mixed)
        user_field, node_field = tower.user_field, tower.node_field
        self.with_node = user_field is not None and node_field is not None
        if user_field is not None and node_field is not None:
            self.register_buffer("user", mixed(fields - 2, user_field.weight.detach()), persistent=False)
            self.register_buffer("node", mixed(fields - 1, node_field.weight.detach()), persistent=False)
            bias += mixed(fields - 2, user_field.bias.detach().unsqueeze(-1))
            bias += mixed(fields - 1, node_field.bias.detach().unsqueeze(-1))
        self.register_buffer("dense", dense, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def _gather(self, tower: InteractionTower, mixed: Callable[[int, Tensor], Tensor]) -> None:
        """The table of all ids; ``rows``: the weights (kept * e, M * e) of what is gathered from it; and where: a
        slot's row is its id plus ``first`` (M,) plus ``step`` (M, M) times which slots have one.

        The blocks of a space stand in falling order of the number of matches, so that no match at all, which is id 0,
        leads to the block behind them, where every table begins with zeros."""
        specs, width = tower.cross.specs, tower.tables.width
        blocks, behind, at = [], dict[str, int](), 0
        for space, matches in _matches(tower).items():
            table = tower.tables.weight(space).detach().clone()
            table[0] = 0.0  # padding counts for nothing
            blocks += [table / number for number in range(matches, 0, -1)]
            at += matches * len(table)
            behind[space] = at
        slots = specs[-1][2]
        first, step = torch.zeros(slots), torch.zeros(slots, slots)
        rows = torch.zeros(len(mixed(0, torch.eye(width))), slots * width)
        for place, (space, start, stop) in enumerate(specs):
            size = len(tower.tables.weight(space))
            first[start:stop], step[start:stop, start:stop] = behind[space], -size
            rows[:, start * width : stop * width] = mixed(2 * place + 1, torch.eye(width)).repeat(
                1, stop - start
            )
        table = torch.cat([*blocks, torch.zeros(1, width)])
        for name, value in {"table": table, "first": first, "step": step, "rows": rows}.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, user: Tensor, node: Tensor, dense: Tensor | None, ids: Tensor | None) -> Tensor:
        fields: Tensor = self.bias  # type: ignore[assignment]
        if self.with_node:
            of_user: Tensor = torch.matmul(_row(user), self.user.T)  # type: ignore[arg-type]
            fields = fields + of_user.unsqueeze(-1)  # what all candidates share is added to them once
            fields = fields + torch.matmul(self.node, node)  # type: ignore[arg-type]
        if self.crossed:
            assert dense is not None and ids is not None
            fields = fields + torch.matmul(self.dense, dense.transpose(-1, -2))  # type: ignore[arg-type]
            fields = fields + torch.matmul(self.rows, self._matched(ids).transpose(-1, -2))  # type: ignore[arg-type]
        return _network(self.tower.network, _regroup(fields, self.kept, self.width))

    def _matched(self, ids: Tensor) -> Tensor:
        """(B, C, M) int32 -> (B, C, M * e): each slot's row, divided by how many of its interaction matched."""
        given = (ids != 0).to(torch.float32)
        blocks = torch.addmm(self.first, given.flatten(0, 1), self.step)  # type: ignore[arg-type]  # whole numbers
        table: Tensor = self.table  # type: ignore[assignment]
        return _merged(table[ids + blocks.to(torch.int32).view_as(ids)])


def _size(x: Tensor, axis: int) -> int:
    """The size of an axis that the weights fix, as a number: in a trace a shape is a computation of its own."""
    return int(x.shape[axis])


class _Regroup(torch.autograd.Function):
    """(B, ..., C) -> (B, *sizes, C). As one ONNX node: two axes of unknown size would otherwise cost seven more nodes
    that compute the shape, for every reshape of every call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *sizes: int) -> Tensor:
        return x.reshape(x.shape[0], *sizes, -1)

    @staticmethod
    def symbolic(g: Any, x: Any, *sizes: int) -> Any:
        return g.op("Reshape", x, g.op("Constant", value_t=torch.tensor([0, *sizes, -1])))


class _Merge(torch.autograd.Function):
    """(B, m, d, C) -> (B, m, d * C), as one ONNX node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], -1)

    @staticmethod
    def symbolic(g: Any, x: Any) -> Any:
        return g.op("Reshape", x, g.op("Constant", value_t=torch.tensor([0, 0, -1])))


def _regroup(x: Tensor, *sizes: int) -> Tensor:
    """(B, ..., C) -> (B, *sizes, C)."""
    out: Tensor = _Regroup.apply(x, *sizes)
    return out


def _merged(x: Tensor) -> Tensor:
    """(B, m, d, C) -> (B, m, d * C)."""
    out: Tensor = _Merge.apply(x)
    return out


def _row(user: Tensor) -> Tensor:
    """A user's embeddings in one row: (B, n, d) -> (B, n * d)."""
    return user.reshape(-1, _size(user, 1) * _size(user, 2))


def _flat(x: Tensor) -> Tensor:
    """(B, F, e, C) -> (B, F * e, C)."""
    return _regroup(x, _size(x, 1) * _size(x, 2))


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """(..., in, C) -> (..., out, C)."""
    out = torch.matmul(linear.weight, x)
    return out if linear.bias is None else out + linear.bias.unsqueeze(-1)


def _across(linear: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer without bias over the axis before the width: (B, in, d, C) -> (B, out, d, C)."""
    return _regroup(torch.matmul(linear.weight, _merged(x)), linear.out_features, _size(x, 2))


def _softmax(x: Tensor, axis: int) -> Tensor:
    """Written out, because engines transpose for a softmax over any axis but the last."""
    grown = _exponentials(x, axis)
    return grown / grown.sum(axis, keepdim=True)


def _exponentials(x: Tensor, axis: int) -> Tensor:
    """What a softmax over an axis divides by its sum."""
    return torch.exp(x - x.amax(axis, keepdim=True))


def _average(x: Tensor) -> Tensor:
    """The mean over the axis before the last, (..., d, C) -> (..., 1, C), as a product: reductions over an axis that is
    not the last are slow."""
    return torch.matmul(torch.full((1, _size(x, -2)), 1 / _size(x, -2)), x)


def _standard(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Layer norm over the axis before the last, (..., d, C), without its weights."""
    centred = x - _average(x)
    return centred / torch.sqrt(_average(centred * centred) + norm.eps)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Layer norm over the axis before the last: (..., d, C)."""
    return _standard(norm, x) * norm.weight.unsqueeze(-1) + norm.bias.unsqueeze(-1)


def _linear_of_norm(linear: nn.Linear, norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """``linear`` of all of `_norm`'s result, (B, F, e, C) -> (B, out, C), whose weights are put into the linear's."""
    fields = _size(x, 1)
    weight = linear.weight * norm.weight.repeat(fields)
    bias = linear.bias + torch.matmul(linear.weight, norm.bias.repeat(fields))
    return torch.matmul(weight, _flat(_standard(norm, x))) + bias.unsqueeze(-1)


def _network(network: TowerNetwork, x: Tensor) -> Tensor:
    """`TowerNetwork` after its mixing: (B, F, e, C) -> (B, num_embed, dim, C)."""
    norm = network.norm
    for block in network.blocks:
        assert isinstance(block, TowerBlock)
        x = _block(block, _norm(norm, x))
        norm = block.norm
    return _regroup(_linear_of_norm(network.out, norm, x), *network.shape)


def _block(block: TowerBlock, x: Tensor) -> Tensor:
    """Before the block's norm: (B, F, e, C) -> the same."""
    hidden = block.mlp[0]
    assert isinstance(hidden, nn.Linear)
    streams = [torch.relu(_linear(hidden, _flat(_gated(block.gate_mlp, x))))]
    if block.fm is not None and block.gate_fm is not None:
        streams.append(_attention_fm(block.fm, _gated(block.gate_fm, x)))
    return x + _regroup(_linear(block.bridge, torch.cat(streams, dim=1)), _size(x, 1), _size(x, 2))


def _gated(gate: FieldGate, x: Tensor) -> Tensor:
    """(B, F, e, C) -> the same, each field times F times its softmax weight, to which what is added to all scores is
    nothing."""
    scores = torch.matmul(gate.score.weight, x).squeeze(2) + gate.bias.unsqueeze(-1)
    grown = _exponentials(scores, 1)
    return x * (grown / _average(grown)).unsqueeze(2)


def _attention_fm(fm: AttentionFM, x: Tensor) -> Tensor:
    """(B, F, e, C) -> (B, e, C)."""
    pairs = x.index_select(1, fm.left) * x.index_select(1, fm.right)  # type: ignore[arg-type]  # (B, P, e, C)
    scores = torch.matmul(fm.score.weight, torch.relu(_linear(fm.project, pairs)))  # (B, P, 1, C)
    grown = _exponentials(scores, 1)
    ones = torch.ones(1, _size(pairs, 1))
    total = _regroup(torch.matmul(ones, _merged(pairs * grown)), _size(pairs, 2))
    return total / torch.matmul(ones, grown.squeeze(2))


def _over(over: DHENOverArch, user: Tensor, pair: Tensor) -> Tensor:
    """user (B, nu, d), pair (B, m, d, C) -> (B, T, C)."""
    x, norm = _ensemble_layer(over.first, user, pair), over.first.norm
    for layer in over.rest:
        assert isinstance(layer, EnsembleLayer)
        x, norm = _ensemble_layer(layer, None, _norm(norm, x)), layer.norm
    hidden, last = over.head[0], over.head[-1]
    assert isinstance(hidden, nn.Linear) and isinstance(last, nn.Linear)
    return _linear(last, torch.relu(_linear_of_norm(hidden, norm, x)))


def _ensemble_layer(layer: EnsembleLayer, user: Tensor | None, pair: Tensor) -> Tensor:
    """Before the layer's norm: (B, m, d, C) -> (B, k, d, C)."""
    parts = [_regroup(_module(module, user, pair), layer.tokens, layer.width) for module in layer.parallel]
    update = _linear(layer.project, torch.cat(parts, dim=2))
    short = _across(layer.shortcut, pair)
    if layer.user_shortcut is not None:
        assert user is not None
        short = short + torch.matmul(layer.user_shortcut.weight, user).unsqueeze(-1)
    return update + short


def _module(module: nn.Module, user: Tensor | None, pair: Tensor) -> Tensor:
    """(B, m, d, C) -> (B, k * d, C)."""
    if isinstance(module, FMModule):
        return _fm(module, user, pair)
    if isinstance(module, CrossModule):
        crossed = _split_linear(module.left, user, pair) * _split_linear(module.right, user, pair)
        return _linear(module.out, crossed)
    if isinstance(module, MLPModule):
        return _linear(module.out, torch.relu(_split_linear(module.hidden, user, pair)))
    assert isinstance(module, AttentionModule)
    return _attention(module, user, pair)


def _split_linear(linear: SplitLinear, user: Tensor | None, pair: Tensor) -> Tensor:
    """(B, m, d, C) -> (B, out, C)."""
    if linear.user is None:
        return _linear(linear.pair, _flat(pair))
    assert user is not None
    of_user = linear.user(_row(user)) + linear.pair.bias  # once per user
    return torch.matmul(linear.pair.weight, _flat(pair)) + of_user.unsqueeze(-1)


def _fm(module: FMModule, user: Tensor | None, pair: Tensor) -> Tensor:
    products = torch.cat([pair[:, n : n + 1] * pair[:, n:] for n in range(module.pair_tokens)], dim=1)
    dots = [products.sum(2)]  # (B, own, C), as `np.triu_indices` orders them
    if user is not None:
        dots.append(_flat(torch.matmul(user.unsqueeze(1), pair)))  # (B, m * nu, C)
    weight = module.out.weight * module.scale
    out = torch.matmul(weight, torch.cat(dots, dim=1)) + module.out.bias.unsqueeze(-1)
    if module.user_out is not None:
        assert user is not None
        among = _row(torch.matmul(user, user.transpose(-1, -2)))
        among = among.index_select(-1, module.user_flat) * module.scale  # type: ignore[arg-type]
        out = out + module.user_out(among).unsqueeze(-1)
    return out


def _attention(module: AttentionModule, user: Tensor | None, pair: Tensor) -> Tensor:
    tokens, width = _size(pair, 1), _size(pair, 2)
    heads = (module.heads, width // module.heads)
    query = _regroup(_linear(module.q, pair), tokens, *heads) * heads[1] ** -0.5  # (B, m, h, d/h, C)
    key, value = (
        _regroup(part, tokens, *heads).transpose(1, 2)
        for part in _linear(module.kv, pair).split(width, dim=2)
    )
    # (B, m, h, 1, d/h, C) * (B, 1, h, m, d/h, C) -> (B, m, h, m, C)
    logits = (query.unsqueeze(3) * key.unsqueeze(1)).sum(4)
    if user is not None:
        of_user = module.kv(user).reshape(-1, _size(user, 1), 2, *heads)  # (B, nu, 2, h, d/h)
        user_key, user_value = of_user[:, :, 0].transpose(1, 2), of_user[:, :, 1].permute(0, 2, 3, 1)
        logits = torch.cat(
            [logits, torch.matmul(user_key.unsqueeze(1), query)], dim=3
        )  # (B, m, h, m + nu, C)
    weights = _softmax(logits, 3)
    mixed = (weights[:, :, :, :tokens].unsqueeze(4) * value.unsqueeze(1)).sum(3)  # (B, m, h, d/h, C)
    if user is not None:
        mixed = mixed + torch.matmul(user_value.unsqueeze(1), weights[:, :, :, tokens:])
    mixed = _regroup(mixed, tokens, width) + pair  # (B, m, d, C)
    if module.feed_forward is not None:
        grow, shrink = module.feed_forward[0], module.feed_forward[-1]
        assert isinstance(grow, nn.Linear) and isinstance(shrink, nn.Linear)
        mixed = mixed + _linear(shrink, torch.relu(_linear(grow, mixed)))
    return _flat(_linear(module.out, _across(module.mix, mixed)))
