"""Training against a pool: the losses' formulas, the log-Q correction, shared warm starts."""

import numpy as np
import pytest
import torch
from tiny_world import Bar

from hsnn_core.errors import DataError, SchemaError
from hsnn_train import losses
from hsnn_train.batches import held_out, step_rng
from hsnn_train.negatives import CandidateSampler
from hsnn_train.objective import Moment
from hsnn_train.trainer import Trainer, make_pools
from hsnn_train.warm import WarmStarts

POOLED = {"pool": 40, "negatives": 5, "hard": 3, "unlabelled": 0, "init_at": 0.5, "max_steps": 12}
LISTED = POOLED | {"hard": 2, "listed": 2, "listed_from": "history"}
TOWERS_FIRST = {"towers_first": True, "init_at": 0.5, "max_steps": 12}


def test_pooled_softmax_is_the_corrected_log_softmax_of_the_positive():
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]]).unsqueeze(-1)
    log_inclusion = torch.log(torch.tensor([0.5, 1.0, 0.25]))
    positive, weights = torch.tensor([2, 0]), torch.tensor([[1.0], [0.0]])
    corrected = np.exp(np.array([1.0, 2.0, 0.5])) / np.array([0.5, 1.0, 0.25])
    expected = -np.log(corrected[2] / corrected.sum()) / 2  # the second user's label is 0
    assert losses.pooled_softmax(logits, positive, log_inclusion, weights).item() == pytest.approx(expected)


def test_sampled_softmax_leaves_out_what_is_not_labelled():
    logits = torch.tensor([[[1.0], [2.0], [9.0]]])
    labels = torch.tensor([[[1.0], [0.0], [0.0]]])
    labelled = torch.tensor([[1.0, 1.0, 0.0]])
    expected = -np.log(np.e / (np.e + np.e**2))
    assert losses.sampled_softmax(logits, labels, labelled, torch.ones(1)).item() == pytest.approx(expected)


def test_ranking_distillation_is_least_at_the_teacher_and_gives_it_no_gradient():
    teacher = torch.tensor([[[0.3], [1.2], [-0.5]]], requires_grad=True)
    labelled = torch.ones(1, 3)
    own = teacher.detach() + 2.0  # a constant more is the same ranking
    entropy = torch.distributions.Categorical(logits=teacher.detach()[0, :, 0]).entropy().item()
    assert losses.distil_ranking(own, teacher, labelled).item() == pytest.approx(entropy, rel=1e-5)
    other = torch.zeros(1, 3, 1, requires_grad=True)
    loss = losses.distil_ranking(other, teacher, labelled)
    assert loss.item() > entropy
    loss.backward()
    assert teacher.grad is None
    target = torch.softmax(teacher.detach()[..., 0], -1)
    assert losses.match(own[..., 0], target).item() == pytest.approx(entropy, rel=1e-5)


def test_a_pool_holds_the_positives_and_says_how_likely_each_item_was_in_it(dataset, make_recipe):
    pools_of = make_pools(dataset, make_recipe(train=POOLED | {"pool": 20}), None)
    rows = np.flatnonzero(dataset.train.labels[:, 0] > 0)[:16]
    pools = [pools_of.draw(dataset.train, rows, step_rng(0, step)) for step in range(400)]
    own = dataset.train.item_row[rows]
    for pool in pools[:5]:
        assert np.array_equal(pool.rows[pool.positive], own)
        assert np.all(np.diff(pool.rows) > 0)
    drawn = CandidateSampler(dataset.item_counts, make_recipe().train.negative_power, everything=False)
    absent = np.setdiff1d(drawn.rows, own)  # in the pool by its 20 draws alone
    seen = np.mean([np.isin(absent, pool.rows) for pool in pools], axis=0)
    share = drawn.share[np.searchsorted(drawn.rows, absent)]
    np.testing.assert_allclose(seen, 1 - (1 - share) ** 20, atol=0.09)
    whole = make_pools(dataset, make_recipe(train=POOLED | {"pool": 10_000}), None)
    everything = whole.draw(dataset.train, rows, step_rng(0, 0))
    assert np.array_equal(everything.rows, drawn.rows)
    assert not everything.log_inclusion.any()


@pytest.mark.parametrize("train", [POOLED, LISTED, TOWERS_FIRST], ids=["pool", "lists", "impressions"])
def test_a_shared_warm_start_gives_the_same_weights_to_the_bit(dataset, make_recipe, tmp_path, train):
    folder = WarmStarts(tmp_path / "warm")

    def trained(name, layers, warm):
        depth = len(layers) - 1
        model = {"layers": layers, "codebooks": [5] * depth, "dropout": 0.2}
        recipe = make_recipe(model=model, search={"widths": [3] * depth}, train=train)
        return Trainer(recipe, dataset, tmp_path / name, progress=False, warm=warm)

    trained("first", ["cpu_s"], folder).train()
    assert len(list((tmp_path / "warm").iterdir())) == 1
    for layers in (["cpu_s", "cpu_xs"], ["cpu_m", "cpu_s", "cpu_s"]):
        alone = trained("alone", layers, None)
        plain = alone.train().state_dict()
        shared = trained("shared", layers, folder)
        got = shared.train().state_dict()
        assert all(torch.equal(got[name], plain[name]) for name in plain)
        assert [row["step"] for row in shared.history if "supervised" in row] == [
            row["step"] for row in alone.history if "supervised" in row
        ]
    assert len(list((tmp_path / "warm").iterdir())) == 1


def test_towers_that_saw_all_users_are_not_shared_with_those_that_did_not(dataset, make_recipe, tmp_path):
    folder = WarmStarts(tmp_path / "warm")
    for name, layers in (("towers", ["cpu_xs", "cpu_xs"]), ("monn", ["cpu_xs", "cpu_s"])):
        recipe = make_recipe(model={"layers": layers, "codebooks": [5]}, search={"widths": [3]},
                             train=POOLED | {"held": 0.4})  # fmt: skip
        Trainer(recipe, dataset, tmp_path / name, progress=False, warm=folder).train()
    assert len(list((tmp_path / "warm").iterdir())) == 2


@pytest.mark.parametrize(
    "train",
    [POOLED, LISTED, TOWERS_FIRST, POOLED | {"held": 0.4, "batch_size": 100}],
    ids=["pool", "lists", "impressions", "held"],
)
def test_an_interrupted_run_of_two_phases_ends_where_an_uninterrupted_one_does(
    dataset, make_recipe, tmp_path, train
):
    layers = {"layers": ["cpu_s", "cpu_s"], "codebooks": [5], "dropout": 0.2}
    recipe = make_recipe(model=layers, search={"widths": [3]}, train=train | {"checkpoint_steps": 4})
    whole = Trainer(recipe, dataset, tmp_path / "whole", progress=False).train().state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_one_step", _stop_after(Trainer._one_step, 9))
        with pytest.raises(RuntimeError, match="pulled the plug"):
            Trainer(recipe, dataset, tmp_path / "cut", progress=False).train()
    resumed = Trainer(recipe, dataset, tmp_path / "cut", resume=True, progress=False).train().state_dict()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def _stop_after(step, count):
    done = 0

    def one(trainer):
        nonlocal done
        done += 1
        if done > count:
            raise RuntimeError("pulled the plug")
        return step(trainer)

    return one


@pytest.mark.parametrize(("towers_lr", "first"), [(0.0, 0.01), (0.04, 0.04)])
def test_the_first_phase_may_have_a_learning_rate_of_its_own(
    dataset, make_recipe, tmp_path, towers_lr, first
):
    train = POOLED | {"lr": 0.01, "towers_lr": towers_lr, "trunk_lr": 0.5, "max_steps": 4}
    trainer = Trainer(make_recipe(train=train), dataset, tmp_path / "run", progress=False)
    trainer._refresh(Bar())
    used = []
    for step in range(4):
        losses_of(trainer, step)
        used.append([group["lr"] / trainer._lr_factor() for group in trainer.optimizer.param_groups])
    assert used[:2] == [pytest.approx([first, first])] * 2  # trunk, and what else is trained
    assert used[2:] == [pytest.approx([0.005, 0.01])] * 2
    with pytest.raises(SchemaError, match=r"train.towers_lr: got -1.0, expected a number of at least 0"):
        make_recipe(train=POOLED | {"towers_lr": -1.0})
    with pytest.raises(SchemaError, match=r"train.held: has no effect without train.pool"):
        make_recipe(train={"held": 0.1})
    with pytest.raises(
        SchemaError, match=r"train.held: got 1.0, expected a share of the users, at least 0 and below"
    ):
        make_recipe(train=POOLED | {"held": 1.0})
    with pytest.raises(SchemaError, match=r"train.towers_lr: has no effect without train.pool"):
        make_recipe(train={"towers_lr": 0.1})


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"pool": 10, "negatives": 0}, "train.pool: is for logs of positives alone"),
        ({"pool": 10, "negatives": 2, "unlabelled": 1}, "expected 0 beside train.pool"),
        ({"order": "clicks"}, "train.order: got 'clicks', expected labels or requests"),
        ({"order": "requests"}, "train.order: requests is for logs of positives alone; set train.pool"),
        ({"hard": 1, "negatives": 2}, "train.hard and train.listed: got 1 and 0, expected less than"),
    ],
)
def test_settings_of_a_pool_that_make_no_sense_are_named(make_recipe, train, message):
    with pytest.raises(SchemaError, match=message):
        make_recipe(train={"unlabelled": 0} | train)


def losses_of(trainer, step):
    """The parts of the step's loss in a pooled run that stands there."""
    trainer.step = step
    trainer.model.train()
    return trainer._one_step()[0]


def test_before_the_index_only_the_item_layers_towers_learn_from_impressions(dataset, make_recipe, tmp_path):
    recipe = make_recipe(train=TOWERS_FIRST | {"init_at": 1.0})
    trainer = Trainer(recipe, dataset, tmp_path / "run", progress=False)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    layers = trainer.model.layers
    own = f"trunks.{trainer.model.trunk_of[-1]}.", f"monn.{layers - 1}.dot."
    assert any(name.startswith(own[0]) for name in moved)
    assert all(name.startswith(own) or name.startswith("lti.") for name in moved)
    assert [row["supervised"] for row in trainer.history if "supervised" in row][-1] > 0


@pytest.mark.parametrize("candidates", ["all", "seen_before"])
def test_items_that_had_not_appeared_learn_nothing_from_the_pool(dataset, make_recipe, tmp_path, candidates):
    recipe = make_recipe(train=POOLED | {"pool": 1000, "distil": 0.0}, search={"candidates": candidates})
    trainer = Trainer(recipe, dataset, tmp_path / "run", progress=False)
    trainer._refresh(Bar())
    rows = np.flatnonzero(dataset.train.labels[:, 0] > 0)[:12]
    to_come = np.flatnonzero(
        (dataset.item_counts > 0) & (dataset.item_first_time > dataset.train.time[rows[-1]])
    )
    assert len(to_come) > 20
    for step in (0, trainer.init_step):  # the two towers alone, then everything
        trainer.step = step
        moment = Moment(trainer.alpha(), 1.0, trainer._warming)
        parts, _ = trainer.objective(rows, trainer.state, moment, step_rng(0, step))
        trainer.optimizer.zero_grad()
        assert torch.isfinite(parts["loss"])
        (parts["retrieval"] + parts.get("nodes", 0.0)).backward()
        own = trainer.model.trunk(3).lookup.tables.weight("item").grad[to_come + 2]
        assert bool(own.abs().sum(-1).gt(0).all()) == (candidates == "all")
        assert bool(own.any()) == (candidates == "all")


def test_only_a_learnt_index_pulls_its_items_and_only_after_the_first_phase(dataset, make_recipe, tmp_path):
    def trainer(index):
        recipe = make_recipe(
            model={"index": index}, train=POOLED | {"commitment": 0.5, "warmup": 0.0, "node_distil": 1.0}
        )
        made = Trainer(recipe, dataset, tmp_path / index, progress=False)
        made._refresh(Bar())
        return made

    joint = trainer("joint")
    assert "commitment" not in losses_of(joint, 0)
    joint._refresh(Bar())
    parts = losses_of(joint, joint.init_step)
    assert parts["commitment"].item() > 0
    assert parts["node_distil"].item() > 0
    assert "commitment" not in losses_of(trainer("kmeans"), 8)


def test_the_temperature_of_the_item_layer_stays(dataset, make_recipe, tmp_path):
    recipe = make_recipe(model={"layers": ["cpu_s", "cpu_s"], "codebooks": [5]},
                         search={"widths": [3]}, train=POOLED | {"temperature": 0.2})  # fmt: skip
    trainer = Trainer(recipe, dataset, tmp_path / "run", progress=False)
    given = torch.full((2,), -np.log(0.2), dtype=torch.float32)
    assert torch.allclose(trainer.model.layer(1).dot.log_scale, given)
    model = trainer.train()
    assert torch.allclose(model.layer(2).dot.log_scale, given)
    assert not torch.allclose(model.layer(1).dot.log_scale, given), (
        "centroids are shorter: a node layer learns its own"
    )
    with pytest.raises(SchemaError, match=r"train.temperature: got 0.0, expected a number above 0"):
        make_recipe(train=POOLED | {"temperature": 0.0})


def test_held_users_are_new_to_the_second_phase_and_all_it_sees(dataset, make_recipe, tmp_path):
    flat = {"model": {"layers": ["cpu_s"], "codebooks": []}, "search": {"widths": []}}
    recipe = make_recipe(train=POOLED | {"held": 0.4, "max_steps": 60, "batch_size": 64}, **flat)
    trainer = Trainer(recipe, dataset, tmp_path / "run", progress=False)
    seen = []
    for trainer.step in range(60):
        seen.append(trainer._rows())
    held = held_out(dataset.train.user_key, 0.4)
    first, second = np.concatenate(seen[:30]), np.concatenate(seen[30:])
    assert set(first) == set(np.flatnonzero(~held)) and set(second) == set(np.flatnonzero(held))
    steps = -(-int((~held).sum()) // 64)
    once = np.sort(np.concatenate(seen[:steps]))  # an epoch of its own: every example once
    assert np.array_equal(once, np.flatnonzero(~held))
    with pytest.raises(
        DataError, match=r"train.held: 1e-06 of the users is none of them; set a share that leaves"
    ):
        Trainer(
            make_recipe(train=POOLED | {"held": 1e-6}, **flat), dataset, tmp_path / "none", progress=False
        )
    late = make_recipe(train=POOLED | {"held": 0.4, "init_at": 1.0}, **flat)
    with pytest.raises(
        DataError, match=r"train.held: the first phase has 12 of 12 steps, expected some for each"
    ):
        Trainer(late, dataset, tmp_path / "late", progress=False)


@pytest.mark.parametrize("codebooks", [[], [6]])
def test_two_towers_alone_see_every_user(dataset, make_recipe, tmp_path, codebooks):
    towers = {"layers": ["two_tower_xs"] * (1 + len(codebooks)), "codebooks": codebooks, "index": "kmeans"}
    search = {"widths": [4] * len(codebooks)}
    recipe = make_recipe(train=POOLED | {"held": 0.4, "batch_size": 4096}, model=towers, search=search)
    trainer = Trainer(recipe, dataset, tmp_path / "run", progress=False)
    for trainer.step in (0, 6, 11):
        assert len(trainer._rows()) == len(dataset.train)


def test_users_are_held_out_by_share_and_whole():
    users = np.repeat(np.arange(20_000), 2)
    held = held_out(users, 0.15)
    assert np.array_equal(held[::2], held[1::2])
    assert held.mean() == pytest.approx(0.15, abs=0.01)
    assert (held <= held_out(users, 0.3)).all()
    assert not held_out(users, 0.0).any()
